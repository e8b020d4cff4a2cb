"""Techniques that could answer: those of the presets, and those that evidence has tried, each with its identity.

The identity of a technique is what must be equal before evidence of one speaks for another: in tuning the adapter and
the form of the frozen weights, in inference the form of the weights and of the KV cache, in pre-training the blocks.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence

from efficientllm import registry
from efficientllm.config.differences import base, differences
from efficientllm.config.plain import flatten, plain
from efficientllm.config.presets import (  # type: ignore[attr-defined]  # found by the package's __path__
    attention,
    infer,
    mixers,
    moe,
    position,
    tune,
)
from efficientllm.recommend.request import Changes

Identity = tuple[tuple[str, str], ...]
# Keys of `config.model` that do not change what is learnt, or that are asked for.
_NO_BLOCKS = (
    *("size", "pretrained", "precision", "remat", "scan", "unroll", "attention_kernel", "kv_cache"),
    *("parameters_of", "tied"),
)
_KINDS = {"mixer": "mixer", "ffn": "ffn", "position": "position", "norm": "norm"}
FROZEN_FORMS = ("float32", "bfloat16", "int8()", "nf4(block=64)")
KV_CACHES = ("activation", "bfloat16", "int8")
REFERENCES = {"pretrain": "gqa", "tune": "lora", "infer": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Technique:
    """A config, and changes of it, that stand for a technique whatever the model is."""

    name: str
    config: str
    changes: tuple[tuple[str, typing.Any], ...]
    identity: Identity


def list_techniques(task: str, tried: Sequence[Changes]) -> list[Technique]:
    """Every technique of the presets, and of `tried`, the configs of evidence; one of each identity.

    In pre-training only those that evidence has tried: an untested architecture answers nothing.
    """
    presets = {"pretrain": _architectures, "tune": _methods, "infer": _forms}[task]
    by_identity = {technique.identity: technique for technique in presets()}
    known = {} if task == "pretrain" else dict(by_identity)
    for config in tried:
        identity = identity_of(task, config)
        known.setdefault(identity, by_identity.get(identity) or _of_config(task, config, identity))
    return list(known.values())


def identity_of(task: str, config: Changes) -> Identity:
    """The identity of the technique in a flat config; keys that it lacks have the base config's values."""
    values = base() | dict(config)
    if task == "tune":
        return (("adapter", complete("adapter", values["adapter"])), ("quant", complete("quant", values["quant"])))
    if task == "infer":
        return (("quant", complete("quant", values["quant"])), ("kv_cache", values["model.kv_cache"]))
    blocks = {key.removeprefix("model."): value for key, value in values.items() if key.startswith("model.")}
    return tuple(
        (key, complete(_KINDS[key], value) if key in _KINDS else str(value))
        for key, value in sorted(blocks.items())
        if key not in _NO_BLOCKS
    )


def complete(kind: str, spec: str) -> str:
    """A spec with all its fields, so that `nf4()` and `nf4(block=64)` are one. Raises UserError for an unknown name."""
    name, values = registry.parse_spec(spec)
    parameters = registry.spec_parameters(registry.lookup(kind, name))
    defaults = {key: p.default for key, p in parameters.items() if p.default is not p.empty}
    return registry.format_spec(name, dict(sorted((defaults | values).items())))


def preset_of(task: str, used: Mapping[str, str | None], variant: str) -> Changes | None:
    """The flat config behind a report's names of techniques, for reports that hold no configs; None if unknown.

    A variant's name may end in a method of rounding, as `int4_gptq` does.
    """
    if task == "tune":
        name = (used.get("tuning") or "").replace("-", "_")
        form = used.get("precision") or "float32"
        if name not in tune.ADAPTERS:
            return None
        return {"adapter": tune.ADAPTERS[name], "quant": tune.FORMS["qlora"] if form == "nf4" else form}
    if task == "infer":
        form, method = used.get("precision") or "", variant.rpartition("_")[2]
        is_rounded = form == "int4" and method in ("rtn", "awq", "gptq")
        return {"quant": f"int4(method={method!r})" if is_rounded else form} if form else None
    return _architecture_named(used)


def _architecture_named(used):
    mixer, place, ffn = (used.get(key) or "" for key in ("attention", "position", "ffn"))
    if ffn == "moe":
        return _values(moe.get_config()) if (mixer, place) == ("gqa", "rope") else None
    if mixer in mixers.VARIANTS:
        return _values(mixers.get_config(mixer))
    if place not in ("rope", "") and mixer == "gqa" and place in position.VARIANTS:
        return _values(position.get_config(place))
    return _values(attention.get_config(mixer)) if mixer in attention.VARIANTS else None


def _values(config):
    """The values of a config that differ from the base config's."""
    flat = flatten(plain(config))
    return {key: flat[key] for key in differences(flat)}


def _methods():
    for name, adapter in tune.ADAPTERS.items():
        if name == "qlora":
            continue
        for form in FROZEN_FORMS if name != "full" else FROZEN_FORMS[:1]:
            config = f"configs/tune.py:{'qlora' if (name, form) == ('lora', FROZEN_FORMS[-1]) else name}"
            changes = {"quant": form} if form != "float32" and not config.endswith("qlora") else {}
            label = name if form == "float32" else f"{name} over {registry.parse_spec(form)[0]}"
            identity = identity_of("tune", {"adapter": adapter, "quant": form})
            yield Technique(label, config, tuple(changes.items()), identity)


def _forms():
    for name, form in infer.ROUNDED.items():
        for cache in KV_CACHES:
            identity = identity_of("infer", {"quant": form, "model.kv_cache": cache})
            label = name if cache == "activation" else f"{name}, {cache} KV cache"
            changes = {} if cache == "activation" else {"model.kv_cache": cache}
            yield Technique(label, f"configs/infer.py:{name}", tuple(changes.items()), identity)


def _architectures():
    variants = [(f"attention.py:{name}", name, attention.get_config(name)) for name in attention.VARIANTS]
    variants += [(f"position.py:{name}", name, position.get_config(name)) for name in position.VARIANTS]
    variants += [(f"mixers.py:{name}", name, mixers.get_config(name)) for name in mixers.VARIANTS]
    variants.append(("moe.py", "moe", moe.get_config()))
    known = set()
    for file, name, config in variants:
        identity = identity_of("pretrain", _values(config))
        if identity not in known:
            known.add(identity)
            yield Technique(name, f"configs/{file}", (), identity)


def _of_config(task, config, identity):
    """A Technique that no preset is: the changes of it from a preset of the task."""
    if task == "tune":
        name = registry.parse_spec(config.get("adapter", "full()"))[0]
        preset = name if name in tune.ADAPTERS else "lora"
        changes = {key: config[key] for key in ("adapter", "quant", "train.schedule") if key in config}
        form = config.get("quant", "float32")
        label = config.get("adapter", "full()") + ("" if form == "float32" else f" over {form}")
        return Technique(label, f"configs/tune.py:{preset}", tuple(changes.items()), identity)
    if task == "infer":
        changes = {key: config[key] for key in ("quant", "model.kv_cache") if key in config}
        label = config.get("quant", "float32")
        label += f", {config['model.kv_cache']} KV cache" if "model.kv_cache" in config else ""
        return Technique(label, "configs/infer.py", tuple(changes.items()), identity)
    changes = {
        key: _tuples(value)
        for key, value in config.items()
        if key.startswith("model.") and key.removeprefix("model.") not in (*_NO_BLOCKS[:-2],)
    }
    label = ", ".join(str(value) for key, value in changes.items() if key != "model.parameters_of") or "gqa"
    return Technique(label, "configs/base.py", tuple(changes.items()), identity)


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
