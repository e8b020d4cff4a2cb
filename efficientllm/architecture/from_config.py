"""From `config.model` to the language model it names: specs completed from the size, and what does not fit refused."""

import jax

from efficientllm import model as models
from efficientllm import registry
from efficientllm.architecture import equal_parameters
from efficientllm.errors import UserError, did_you_mean
from efficientllm.ffns.base import FFN
from efficientllm.mixers import kv_cache
from efficientllm.mixers.base import Mixer
from efficientllm.ops import rematerialization
from efficientllm.registry import build, complete_spec

_PROTOCOLS = {"mixer": Mixer, "ffn": FFN}


def from_config(model, tokenizer_size=None):
    """The LM that `config.model` describes. `tokenizer_size` is needed where the size names no vocabulary.

    Raises UserError naming the key that does not fit.
    """
    return _describe(model, sized(model, tokenizer_size), tokenizer_size)


def sized(model, tokenizer_size=None):
    """The size of `config.model`, with the widths that its `parameters_of` gives it. Raises UserError."""
    size = build("size", model.size, where="config.model.size")
    return _equal_parameters(model, size, tokenizer_size) if model.parameters_of else size


def check(model):
    """The LM of `config.model` at the size's own widths: refuses what does not fit, and counts no parameters.

    Raises UserError as `from_config` does.
    """
    if model.parameters_of:
        _reference(model)
    return _describe(model, build("size", model.size, where="config.model.size"))


def has_vocabulary(model):
    """Whether the size of `config.model` names its vocabulary, so that no tokenizer is needed to describe the model."""
    return build("size", model.size, where="config.model.size").vocab_size is not None


def _equal_parameters(model, size, tokenizer_size):
    """The size at which the model has as many parameters as a plain one with blocks of `config.model.parameters_of`."""

    def count(model, size):
        lm = _describe(model, size, tokenizer_size or 8)
        return sum(leaf.size for leaf in jax.tree.leaves(models.abstract_params(lm)))

    reference = _reference(model)
    return equal_parameters.matched(size, count(reference, size), lambda size: count(model, size), model.parameters_of)


def _reference(model):
    """The plain `config.model` with blocks of its `parameters_of`."""
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
    own = ("precision", "attention_kernel", "kv_cache")
    defaults = size.defaults() | {key: model[key] for key in own}
    for kind in ("norm", "position"):
        defaults[kind] = complete_spec(kind, model[kind], defaults, where=f"config.model.{kind}")
        build(kind, defaults[kind], where=f"config.model.{kind}")
    blocks = tuple(_block(entry, model.ffn, defaults) for entry in model.pattern or (model.mixer,))
    half_layers = models.half_layers(blocks)
    if 2 * size.num_layers % half_layers:
        raise UserError(
            f"config.model.pattern has {half_layers / 2:g} layers; {size.num_layers} layers are no multiple of that"
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
        residual=_one_of("residual", model.residual, ("sequential", "parallel")),
        precision=model.precision,
        tied=model.tied,
        embed_norm=model.embed_norm,
        remat=model.remat,
        scan=model.scan,
    )


def _one_of(key, value, known):
    if value not in known:
        raise UserError(f"config.model.{key} = {value!r} is none of {', '.join(known)}{did_you_mean(value, known)}")
    return value


def _check_positions(blocks, model_position):
    """Every mixer admits its position, and a position of the embeddings is the model's own."""
    for mixer, _ in blocks:
        name, fields = registry.parse_spec(mixer)
        if (spec := fields.get("position")) is None:
            continue
        acts_on = build("position", spec).acts_on
        admitted = registry.lookup("mixer", name).admits
        if acts_on is not None and acts_on not in admitted:
            raise UserError(
                f"config.model.position = {spec!r} acts on the {acts_on}; mixer {name!r} admits positions that act on "
                f"the {' or the '.join(admitted)}"
            )
        if acts_on == "embedding" and spec != model_position:
            raise UserError(f"{mixer}: a position of the embeddings is the whole model's: set config.model.position")


def _check_cache(blocks, kind):
    """Refuses a kind of KV cache that there is none of, or that no mixer has."""
    kv_cache.dtype(kind, "float32")
    fields = [registry.spec_parameters(registry.lookup("mixer", registry.parse_spec(mixer)[0])) for mixer, _ in blocks]
    if kind != "activation" and not any("kv_cache" in each for each in fields):
        raise UserError(
            f"config.model.kv_cache = {kind!r}: no mixer of this model keeps its state so; take 'activation', or one "
            "of mha, mqa, gqa, window, mla"
        )


def _block(entry, ffn, defaults):
    """`"mixer"` or `"mixer | ffn"` -> complete specs of both, each built once so that a bad one is refused here."""
    mixer, _, own_ffn = entry.partition("|")
    specs = []
    for kind, spec in (("mixer", mixer), ("ffn", own_ffn or ffn)):
        specs.append(complete_spec(kind, spec.strip(), defaults, where=f"config.model.{kind}"))
        _check_protocol(kind, specs[-1], build(kind, specs[-1], where=f"config.model.{kind}"))
    return tuple(specs)


def _check_protocol(kind, spec, module):
    """Refuses a technique of the user's own that lacks the hooks of its kind; None is the ffn of a mixer alone."""
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
