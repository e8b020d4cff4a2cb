"""Builds the model of `config.model`.

Specs inherit open fields from the size. Combinations that do not fit are refused with the key at fault.
"""

import typing

import jax
from ml_collections import ConfigDict

from efficientllm import model as models
from efficientllm import registry, weights
from efficientllm.architecture import equal_parameters
from efficientllm.architecture.sizes import Size
from efficientllm.errors import UserError, did_you_mean
from efficientllm.ffns.base import FFN
from efficientllm.mixers import kv_cache
from efficientllm.mixers.base import Mixer
from efficientllm.ops import rematerialization
from efficientllm.registry import build, complete_spec
from efficientllm.registry.block_entries import parse_entry, split_specs

# How a model is computed that no run's config describes.
_PLAIN: dict[str, typing.Any] = {
    "precision": "float32",
    "attention_kernel": "auto",
    "kv_cache": "activation",
    "remat": "none",
}
_PLAIN |= {"scan": True, "unroll": 12}
_PROTOCOLS = {"mixer": Mixer, "ffn": FFN}


def complete_model(model: dict[str, typing.Any]) -> ConfigDict:
    """Completes values of `config.model` with the defaults of checking and converting, among them float32."""
    return ConfigDict(_PLAIN | model)


def from_config(model: ConfigDict, inputs: typing.Any = None) -> models.Backbone:
    """Builds the model of `config.model`.

    `inputs` is what its data say of it: a tokenizer's number of tokens, or an `embeds.picture.ImageFormat`. It is
    needed where `config.model` does not say it. Raises UserError naming the key that does not fit.
    """
    return _describe(model, sized(model, inputs), inputs)


def sized(model: ConfigDict, inputs: typing.Any = None) -> Size:
    """Builds the size of `config.model`, at the width that `parameters_of` asks for. Raises UserError."""
    size = build("size", model.size, where="config.model.size")
    return _equal_parameters(model, size, inputs) if model.parameters_of else size


def check(model: ConfigDict) -> models.Backbone:
    """Builds the LM of `config.model` at the unchanged widths of its size. Counts no parameters, so it is fast.

    Raises UserError as `from_config` does.
    """
    if model.parameters_of:
        _reference(model)
    return _describe(model, build("size", model.size, where="config.model.size"))


def is_complete(model: ConfigDict) -> bool:
    """Whether `config.model` names its vocabulary or picture: the model can then be built without any data."""
    ends = build("embed", model.embed, where="config.model.embed")
    return ends.is_complete(build("size", model.size, where="config.model.size"))


def adds_images(embed: str, of_checkpoint: dict[str, typing.Any]) -> bool:
    """Whether `embed`, of a config, gives images to a checkpoint's language model, which reads text alone."""
    specs = embed, of_checkpoint.get("embed", "tokens()")
    reads = [build("embed", spec, where="config.model.embed").reads for spec in specs]
    return reads == ["text and images", "text"]


def _equal_parameters(model, size, inputs):
    """The size at which the model has as many parameters as the reference model of `config.model.parameters_of`."""

    ends = build("embed", model.embed, where="config.model.embed")

    def count(model, size):
        lm = _describe(model, size, ends.unknown if inputs is None else inputs)
        return sum(leaf.size for leaf in jax.tree.leaves(models.abstract_params(lm)))

    reference = _reference(model)
    return equal_parameters.matched(size, count(reference, size), lambda size: count(model, size), model.parameters_of)


def _reference(model):
    """`config.model` with the blocks of `parameters_of`, and in text with RoPE, RMSNorm and a tied head."""
    mixer, _, ffn = model.parameters_of.partition("|")
    block = {"mixer": mixer.strip(), "ffn": ffn.strip() or model.ffn, "pattern": ()}
    for kind in ("mixer", "ffn"):
        complete_spec(kind, block[kind], {}, where="config.model.parameters_of")
    reference = model.copy_and_resolve_references()
    reference.update(block)
    if build("embed", model.embed).reads == "text":
        reference.update({"position": "rope", "norm": "rmsnorm", "embed_norm": False, "tied": True})
    return reference


def _describe(model, size, inputs=None):
    """The LM of `config.model` at a given size."""
    if model.precision == weights.AUTO:
        model = ConfigDict(model.to_dict() | {"precision": weights.choose_precision().chosen})
    build("precision", model.precision, where="config.model.precision")
    if model.remat not in ("none", "full"):
        rematerialization.policy(model.remat)
    inherited_keys = ("precision", "attention_kernel", "kv_cache")
    defaults = size.defaults() | {key: model[key] for key in inherited_keys}
    for kind in ("norm", "position"):
        defaults[kind] = complete_spec(kind, model[kind], defaults, where=f"config.model.{kind}")
        build(kind, defaults[kind], where=f"config.model.{kind}")
    ends = build("embed", model.embed, defaults, where="config.model.embed")
    defaults |= ends.inherited()
    entries = tuple(map(parse_entry, model.pattern or (model.mixer,)))
    blocks = tuple(_block(entry, model.ffn, defaults) for entry in entries)
    repeats = _repeats(entries, blocks, size.num_layers)
    _check_positions(blocks, defaults["position"])
    _check_cache(blocks, model.kv_cache)
    backbone = {
        "blocks": blocks,
        "num_layers": size.num_layers,
        "dim": size.dim,
        "norm": defaults["norm"],
        "position": defaults["position"],
        "residual": _checked_choice("residual", model.residual, ("sequential", "parallel")),
        "precision": model.precision,
        "remat": model.remat,
        "scan": model.scan,
        "unroll": model.unroll,
        "modulation": complete_spec("modulation", model.modulation, defaults, where="config.model.modulation"),
        "repeats": repeats,
    }
    built = ends.model(backbone, model, size, inputs)
    check_order(blocks, built.order)
    return built


def _repeats(entries, blocks, num_layers):
    """The counts of the entries of a pattern, () without any. Refuses those that do not make `num_layers` layers."""
    counts = tuple(entry.repeats for entry in entries)
    if not any(counts):
        if 2 * num_layers % (half_layers := models.half_layers(blocks)):
            raise UserError(
                f"config.model.pattern: {half_layers / 2:g} layers do not divide the {num_layers} layers of the size"
            )
        return ()
    if not all(counts):
        raise UserError(
            f"config.model.pattern: entry {[*map(bool, counts)].index(False)} has no count, and others have one; write "
            "'COUNT * mixer | ffn' for each, or no count for a pattern that is repeated as a whole"
        )
    layers = sum(count * models.half_layers((block,)) for count, block in zip(counts, blocks, strict=True)) / 2
    if layers != num_layers:
        total = " + ".join(map(str, counts))
        raise UserError(f"config.model.pattern: counts {total} make {layers:g} layers; the size has {num_layers}")
    return counts


def _checked_choice(key, value, choices):
    if value not in choices:
        raise UserError(
            f"config.model.{key} = {value!r}: must be one of {', '.join(choices)}{did_you_mean(value, choices)}"
        )
    return value


def _check_positions(blocks, model_position):
    """Refuses a position that its mixer does not admit, and a mixer's own position that acts on the embeddings."""
    for mixer in _mixers(blocks):
        name, fields = registry.parse_spec(mixer)
        if (spec := fields.get("position")) is None:
            continue
        position = build("position", spec)
        acts_on = position.acts_on
        admitted = registry.lookup("mixer", name).admits
        if acts_on is not None and acts_on not in admitted:
            raise UserError(
                f"config.model.position = {spec!r}: acts on the {acts_on}; mixer {name!r} admits positions that act on "
                f"the {' or the '.join(admitted)}"
            )
        if (acts_on == "embedding" or position.shared) and spec != model_position:
            kind = "of the embeddings" if acts_on == "embedding" else "that layers share"
            raise UserError(f"{mixer}: a position {kind} belongs to the whole model; set config.model.position")


def check_order(blocks: tuple[tuple[str, str], ...], order: str) -> None:
    """Raises UserError for a mixer or an ffn that does not honour the order of a model's tokens (`Mask.order`)."""
    layers = [("mixer", mixer) for mixer in _mixers(blocks)] + [("ffn", ffn) for _, ffn in blocks]
    for kind, spec in layers:
        name = registry.parse_spec(spec)[0]
        if order not in getattr(registry.lookup(kind, name), "orders", (order,)):
            names = registry.names(kind)
            orders = {other: getattr(registry.lookup(kind, other), "orders", (order,)) for other in names}
            raise UserError(
                f"config.model.{kind} = {spec!r}: {name!r} reads tokens in {' or '.join(orders[name])} order, and "
                f"this model is {order}; take one out of {', '.join(key for key in orders if order in orders[key])}"
            )


def _check_cache(blocks, kind):
    """Refuses an unknown kind of KV cache, and one that no mixer of the model supports."""
    kv_cache.dtype(kind, "float32")
    fields = [
        registry.spec_parameters(registry.lookup("mixer", registry.parse_spec(mixer)[0])) for mixer in _mixers(blocks)
    ]
    if kind != "activation" and not any("kv_cache" in names for names in fields):
        raise UserError(
            f"config.model.kv_cache = {kind!r}: no mixer of this model has such a cache; take 'activation', or a mixer "
            "out of mha, mqa, gqa, window, mla"
        )


def _block(entry, ffn, defaults):
    """`(specs of the mixers joined by " + ", spec of the ffn)` of an entry, complete.

    Builds them, so that a bad spec is refused here.
    """
    mixers = [_complete("mixer", mixer, defaults) for mixer in entry.mixers]
    return " + ".join(mixers), _complete("ffn", entry.ffn or ffn, defaults)


def _complete(kind, spec, defaults):
    complete = complete_spec(kind, spec, defaults, where=f"config.model.{kind}")
    _check_protocol(kind, complete, build(kind, complete, where=f"config.model.{kind}"))
    return complete


def _mixers(blocks):
    return [mixer for mixers, _ in blocks for mixer in split_specs(mixers)]


def _check_protocol(kind, spec, module):
    """Refuses a technique that does not derive from the base class of its kind. None is the ffn of a mixer alone."""
    protocol = _PROTOCOLS[kind]
    if not isinstance(module, protocol) and (kind, module) != ("ffn", None):
        raise UserError(
            f"config.model.{kind} = {spec!r}: {type(module).__name__} does not derive from "
            f"{protocol.__module__}.{protocol.__name__}; derive it, and define what its docstring says"
        )
