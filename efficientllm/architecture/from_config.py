"""Builds the language model of `config.model`.

Specs inherit open fields from the size. Combinations that do not fit are refused with the key at fault.
"""

import jax
from ml_collections import ConfigDict

from efficientllm import model as models
from efficientllm import registry
from efficientllm.architecture import equal_parameters
from efficientllm.architecture.sizes import Size
from efficientllm.errors import UserError, did_you_mean
from efficientllm.ffns.base import FFN
from efficientllm.mixers import kv_cache
from efficientllm.mixers.base import Mixer
from efficientllm.ops import rematerialization
from efficientllm.registry import build, complete_spec

_PROTOCOLS = {"mixer": Mixer, "ffn": FFN}


def from_config(model: ConfigDict, tokenizer_size: int | None = None) -> models.LM:
    """Builds the LM of `config.model`. `tokenizer_size` is needed where the size names no vocabulary.

    Raises UserError naming the key that does not fit.
    """
    return _describe(model, sized(model, tokenizer_size), tokenizer_size)


def sized(model: ConfigDict, tokenizer_size: int | None = None) -> Size:
    """Builds the size of `config.model`, at the width that `parameters_of` asks for. Raises UserError."""
    size = build("size", model.size, where="config.model.size")
    return _equal_parameters(model, size, tokenizer_size) if model.parameters_of else size


def check(model: ConfigDict) -> models.LM:
    """Builds the LM of `config.model` at the unchanged widths of its size. Counts no parameters, so it is fast.

    Raises UserError as `from_config` does.
    """
    if model.parameters_of:
        _reference(model)
    return _describe(model, build("size", model.size, where="config.model.size"))


def has_vocabulary(model: ConfigDict) -> bool:
    """Whether the size of `config.model` names its vocabulary: the model can then be built without a tokenizer."""
    return build("size", model.size, where="config.model.size").vocab_size is not None


def _equal_parameters(model, size, tokenizer_size):
    """The size at which the model has as many parameters as the reference model of `config.model.parameters_of`."""

    def count(model, size):
        lm = _describe(model, size, tokenizer_size or 8)
        return sum(leaf.size for leaf in jax.tree.leaves(models.abstract_params(lm)))

    reference = _reference(model)
    return equal_parameters.matched(size, count(reference, size), lambda size: count(model, size), model.parameters_of)


def _reference(model):
    """`config.model` with the blocks of `parameters_of`, and with RoPE, RMSNorm and a tied head."""
    mixer, _, ffn = model.parameters_of.partition("|")
    block = {"mixer": mixer.strip(), "ffn": ffn.strip() or model.ffn, "pattern": ()}
    for kind in ("mixer", "ffn"):
        complete_spec(kind, block[kind], {}, where="config.model.parameters_of")
    reference = model.copy_and_resolve_references()
    reference.update(block)
    reference.update({"position": "rope", "norm": "rmsnorm", "embed_norm": False, "tied": True})
    return reference


def _describe(model, size, tokenizer_size=None):
    """The LM of `config.model` at a given size."""
    build("precision", model.precision, where="config.model.precision")
    if model.remat not in ("none", "full"):
        rematerialization.policy(model.remat)
    inherited_keys = ("precision", "attention_kernel", "kv_cache")
    defaults = size.defaults() | {key: model[key] for key in inherited_keys}
    for kind in ("norm", "position"):
        defaults[kind] = complete_spec(kind, model[kind], defaults, where=f"config.model.{kind}")
        build(kind, defaults[kind], where=f"config.model.{kind}")
    blocks = tuple(_block(entry, model.ffn, defaults) for entry in model.pattern or (model.mixer,))
    half_layers = models.half_layers(blocks)
    if 2 * size.num_layers % half_layers:
        raise UserError(
            f"config.model.pattern: {half_layers / 2:g} layers do not divide the {size.num_layers} layers of the size"
        )
    _check_positions(blocks, defaults["position"])
    _check_cache(blocks, model.kv_cache)
    return models.LM(
        blocks=blocks,
        num_layers=size.num_layers,
        dim=size.dim,
        vocab_size=_vocab_size(size, tokenizer_size),
        norm=defaults["norm"],
        position=defaults["position"],
        residual=_checked_choice("residual", model.residual, ("sequential", "parallel")),
        precision=model.precision,
        tied=model.tied,
        embed_norm=model.embed_norm,
        remat=model.remat,
        scan=model.scan,
        unroll=model.unroll,
    )


def _checked_choice(key, value, choices):
    if value not in choices:
        raise UserError(
            f"config.model.{key} = {value!r}: must be one of {', '.join(choices)}{did_you_mean(value, choices)}"
        )
    return value


def _check_positions(blocks, model_position):
    """Refuses a position that its mixer does not admit, and a mixer's own position that acts on the embeddings."""
    for mixer, _ in blocks:
        name, fields = registry.parse_spec(mixer)
        if (spec := fields.get("position")) is None:
            continue
        acts_on = build("position", spec).acts_on
        admitted = registry.lookup("mixer", name).admits
        if acts_on is not None and acts_on not in admitted:
            raise UserError(
                f"config.model.position = {spec!r}: acts on the {acts_on}; mixer {name!r} admits positions that act on "
                f"the {' or the '.join(admitted)}"
            )
        if acts_on == "embedding" and spec != model_position:
            raise UserError(
                f"{mixer}: a position of the embeddings belongs to the whole model; set config.model.position"
            )


def _check_cache(blocks, kind):
    """Refuses an unknown kind of KV cache, and one that no mixer of the model supports."""
    kv_cache.dtype(kind, "float32")
    fields = [registry.spec_parameters(registry.lookup("mixer", registry.parse_spec(mixer)[0])) for mixer, _ in blocks]
    if kind != "activation" and not any("kv_cache" in names for names in fields):
        raise UserError(
            f"config.model.kv_cache = {kind!r}: no mixer of this model has such a cache; take 'activation', or a mixer "
            "out of mha, mqa, gqa, window, mla"
        )


def _block(entry, ffn, defaults):
    """Splits `"mixer"` or `"mixer | ffn"` into two complete specs. Builds both, so that a bad spec is refused here."""
    mixer, _, own_ffn = entry.partition("|")
    specs = []
    for kind, spec in (("mixer", mixer), ("ffn", own_ffn or ffn)):
        specs.append(complete_spec(kind, spec.strip(), defaults, where=f"config.model.{kind}"))
        _check_protocol(kind, specs[-1], build(kind, specs[-1], where=f"config.model.{kind}"))
    return tuple(specs)


def _check_protocol(kind, spec, module):
    """Refuses a technique that does not derive from the base class of its kind. None is the ffn of a mixer alone."""
    protocol = _PROTOCOLS[kind]
    if not isinstance(module, protocol) and (kind, module) != ("ffn", None):
        raise UserError(
            f"config.model.{kind} = {spec!r}: {type(module).__name__} does not derive from "
            f"{protocol.__module__}.{protocol.__name__}; derive it, and define what its docstring says"
        )


def _vocab_size(size, tokenizer_size):
    if size.vocab_size is None:
        return tokenizer_size
    if tokenizer_size is not None and tokenizer_size > size.vocab_size:
        raise UserError(
            f"config.tokenizer has {tokenizer_size} tokens, the vocabulary of config.model.size {size.vocab_size}; "
            "choose a smaller tokenizer"
        )
    return size.vocab_size
