"""Allowed values of the config keys and spec fields that are texts or tuples; `key_ranges` has the numbers.

A rule is a function `(where, value, has_plugins)` that raises UserError, `where = value: ...`. `has_plugins` is True
while techniques of `config.imports` are still to be imported, whose names are not known yet.
"""

import typing

from efficientllm import registry
from efficientllm.config.basic_rules import (
    Rule,
    accept_text,
    check_nonempty,
    check_regex,
    constant,
    list_of,
    name_of,
    number,
    numbers,
    one_of,
    regex_pairs,
    sizes,
    tuple_of,
)
from efficientllm.config.carbon_intensity import check_carbon
from efficientllm.config.device_rules import check_hardware, check_mesh, check_remat
from efficientllm.config.path_rules import check_file, check_folder_name, check_path, check_source_path
from efficientllm.config.profiled_steps import check_steps
from efficientllm.errors import UserError, short_repr
from efficientllm.registry import catalogue, ranges
from efficientllm.registry.block_entries import parse_entry

# Fields that a model fills in.
INHERITED = ("norm", "position", "precision", "attention_kernel", "kv_cache", "base", "eps", "text_length")


def check_value(key: str, value: typing.Any, where: str, has_plugins: bool = False) -> None:
    """Raises UserError unless `value` is allowed for the config's `key`."""
    _check_text(where, value)
    if key in KEYS:
        KEYS[key](where, value, has_plugins)


def _check_text(where, value):
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, tuple):
            _check_text(where, text)
        elif isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UserError(f"{where} = {short_repr(value)}: is not text: it holds half of a surrogate pair")


def spec(kind: str, *extra: str) -> Rule:
    """A spec string of `kind`, or one of `extra`."""

    def rule(where, value, has_plugins):
        if value not in extra:
            check_spec(kind, value, where, has_plugins)

    return rule


def check_spec(kind: str, text: str, where: str, has_plugins: bool = False) -> None:
    """Raises UserError for a spec string that names no technique, or sets a field to a value it may not have."""
    name, values = registry.parse_spec(text, where)
    entries = catalogue.entries(kind)
    where = f"{where} = {short_repr(text)}"
    if has_plugins and name not in entries:
        registry.check_fields(kind, name, values, dict.fromkeys(values), where, {})
        return
    registry.check_name(kind, name, entries, where.partition(" = ")[0])
    fields = entries[name].fields
    if fields is None:
        return
    types = {key: field.type for key, field in fields.items()}
    registry.check_fields(kind, name, values, types, where, ranges.FIELDS.get(kind, {}))
    for key, value in values.items():
        if (kind, key) in FIELDS:
            FIELDS[kind, key](f"{where}: {key}", value, has_plugins)
    _check_missing(kind, name, fields, values, where)


def _check_missing(kind, name, fields, values, where):
    inherited = {"schedule": ("steps",), "size": ()}.get(
        kind, (*INHERITED, *catalogue.entries("size")["custom"].fields)
    )
    missing = [key for key, field in fields.items() if field.required and key not in values and key not in inherited]
    if missing:
        raise UserError(f"{where}: {kind} {name!r} needs a value for {', '.join(missing)}")


def check_block(where: str, value: typing.Any, has_plugins: bool = False) -> None:
    """`mixer` or `mixer | ffn`, also with a count and parallel mixers (`block_entries`)."""
    if not isinstance(value, str):
        raise UserError(f"{where} = {short_repr(value)}: is not a block; write 'mixer' or 'mixer | ffn'")
    entry = parse_entry(value)
    for mixer in entry.mixers:
        check_spec("mixer", mixer, where, has_plugins)
    if entry.ffn:
        check_spec("ffn", entry.ffn, where, has_plugins)


def check_optional_block(where: str, value: typing.Any, has_plugins: bool = False) -> None:
    """A block, or nothing."""
    if value != "":
        check_block(where, value, has_plugins)


def check_baseline(where: str, value: typing.Any, has_plugins: bool = False) -> None:
    """The path of a record.json, a quant spec, or nothing."""
    if value.endswith(".json"):
        check_path(where, value)
    elif value:
        check_spec("quant", value, where, has_plugins)


_factors = regex_pairs("number", number(ranges.real(0)))
KEYS = {
    "name": check_folder_name,
    "task": name_of("task"),
    "imports": tuple_of(check_nonempty),
    "mesh": check_mesh,
    "model.pretrained": check_path,
    "model.size": spec("size"),
    "model.mixer": spec("mixer"),
    "model.ffn": spec("ffn"),
    "model.pattern": tuple_of(check_block),
    "model.parameters_of": check_optional_block,
    "model.embed": spec("embed"),
    "model.modulation": spec("modulation"),
    "model.residual": one_of(lambda: ("sequential", "parallel")),
    "model.position": spec("position"),
    "model.norm": spec("norm"),
    "model.precision": spec("precision", "auto"),
    "model.attention_kernel": name_of("attention_kernel", "auto"),
    "model.kv_cache": constant("mixers.kv_cache", "KINDS"),
    "model.remat": check_remat,
    "objective": spec("objective", "pretrained"),
    "adapter": spec("adapter"),
    "quant": spec("quant"),
    "data": spec("data"),
    "autoencoder": spec("autoencoder"),
    "tokenizer": spec("tokenizer", "pretrained"),
    "eval.also": spec("data", ""),
    "train.optimizer": spec("optimizer"),
    "train.schedule": spec("schedule"),
    "train.decay": _factors,
    "train.rates": _factors,
    "infer.prompts": tuple_of(accept_text),
    "infer.negative_prompt": accept_text,
    "text_states": spec("text_states", ""),
    "infer.size": numbers(ranges.whole(1, ranges.WIDEST, "pixels, or frames")),
    "infer.sampler": spec("sampler"),
    "infer.solver": spec("solver", ""),
    "infer.stop": tuple_of(check_nonempty),
    "infer.rules": regex_pairs("spec", spec("quant")),
    "infer.baseline": check_baseline,
    "plan.hardware": check_hardware,
    "plan.of": name_of("planned"),
    "plan.calibration": check_path,
    "profile.steps": check_steps,
    "plan.images": sizes(ranges.whole(1, ranges.WIDEST, "pixels")),
    "quality.tasks": tuple_of(check_nonempty),
    "quality.include": check_path,
    "quality.results": check_file,
    "metrics.meter": check_file,
    "metrics.carbon": check_carbon,
}
FIELDS = {
    **{("mixer", kind): spec(kind) for kind in ("position", "norm", "precision")},
    **{("mixer", kind): name_of(kind, "auto") for kind in ("attention_kernel", "scan_kernel", "rwkv_kernel")},
    ("mixer", "text_norm"): spec("norm"),
    ("mixer", "input_norm"): spec("norm", ""),
    ("mixer", "ffn"): spec("ffn"),
    ("mixer", "block_kernel"): name_of("block_kernel", "auto"),
    ("mixer", "kv_cache"): constant("mixers.kv_cache", "KINDS"),
    **{(kind, "precision"): spec("precision") for kind in ("ffn", "modulation")},
    ("ffn", "activation"): constant("ffns.dense", "ACTIVATIONS"),
    ("ffn", "kind"): constant("ffns.dense", "GELUS"),
    ("ffn", "scores"): constant("ffns.routing", "SCORES"),
    ("ffn", "dispatch"): constant("ffns.moe", "DISPATCH"),
    ("ffn", "kernel"): name_of("grouped_kernel", "auto"),
    ("position", "scaling"): spec("rope_scaling"),
    ("objective", "autoencoder"): spec("autoencoder"),
    ("quant", "method"): constant("quant.int4", "METHODS"),
    ("quant", "embedding"): spec("quant"),
    ("objective", "weight"): constant("objectives.flow", "WEIGHTS"),
    ("objective", "density"): constant("objectives.flow", "DENSITIES"),
    ("solver", "spacing"): constant("solvers.spacing", "SPACINGS"),
    ("solver", "variance"): constant("solvers.ddpm", "VARIANCES"),
    ("solver", "levels"): constant("solvers.euler", "LEVELS"),
    ("adapter", "target"): check_regex,
    ("adapter", "train"): check_regex,
    ("data", "of"): spec("data"),
    ("data", "style"): check_regex,
    ("data", "motion"): check_regex,
    ("data", "path"): check_source_path,
    ("data", "labels"): one_of(lambda: ("folder", "none")),
    ("data", "kind"): constant("data.python_docs", "KINDS"),
    ("data", "tables"): constant("data.chart_tables", "TABLES"),
    ("embed", "tower"): spec("tower"),
    ("tower", "pattern"): tuple_of(check_block),
    **{("tower", kind): spec(kind) for kind in ("position", "norm", "modulation")},
    **{("tower", kind): spec("norm", "") for kind in ("final_norm", "projector_norm")},
    ("embed", "text_embed"): one_of(lambda: ("mlp", "linear")),
    ("tokenizer", "path"): check_source_path,
    ("text_states", "path"): check_source_path,
    ("text_states", "without"): list_of(constant("text_states.pipelines", "ENCODERS")),
    ("text_states", "quant"): spec("quant"),
    ("text_states", "precision"): spec("precision"),
    ("autoencoder", "path"): check_source_path,
    ("autoencoder", "precision"): spec("precision"),
}
