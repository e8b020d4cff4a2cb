"""Rules for config values that are texts or tuples: spec strings, names, regular expressions, paths, pairs of those.

A rule is a function `(where, value, has_plugins)` that raises UserError, `where = value: ...`. `has_plugins` is True
while techniques of `config.imports` are still to be imported, whose names are not known yet.
"""

import functools
import typing

from efficientllm import registry
from efficientllm.errors import UserError, did_you_mean, shown
from efficientllm.registry import catalogue, ranges
from efficientllm.untrusted import files, patterns

Rule = typing.Callable[[str, typing.Any, bool], None]
INHERITED = ("norm", "position", "precision", "attention_kernel", "kv_cache", "base", "eps")  # fields a model fills in
LONGEST_PATH, LONGEST_NAME = 4096, 255  # bytes, on Linux


def check_value(key: str, value: typing.Any, where: str, has_plugins: bool = False) -> None:
    """Raises UserError unless `value` is allowed for the config's `key`."""
    _check_text(where, value)
    if key in KEYS:
        KEYS[key](where, value, has_plugins)


def _check_text(where, value):
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, tuple):
            _check_text(where, text)
        elif isinstance(text, str):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UserError(f"{where} = {shown(value)}: is not text: it holds half of a surrogate pair") from None


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
    where = f"{where} = {shown(text)}"
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


def name_of(kind: str, *extra: str) -> Rule:
    """The name of a technique that has no fields, or one of `extra`."""

    def rule(where, value, has_plugins):
        allowed = [*extra, *catalogue.entries(kind)]
        if not (has_plugins and value not in allowed):
            registry.check_name(kind, value, allowed, where)

    return rule


def one_of(allowed_texts: typing.Callable[[], typing.Collection[str]]) -> Rule:
    """One of the texts that `allowed_texts()` returns, which are read when a value is checked."""

    def rule(where, value, has_plugins):
        allowed = allowed_texts()
        if value not in allowed:
            raise UserError(
                f"{where} = {shown(value)}: is none of {', '.join(allowed)}{did_you_mean(str(value), allowed)}"
            )

    return rule


def constant(module: str, name: str) -> Rule:
    """One of the texts in a constant of a module of the package."""
    return one_of(functools.partial(catalogue.constant, f"efficientllm.{module}", name))


def check_regex(where: str, value: typing.Any, has_plugins: bool = False) -> None:
    """A regular expression."""
    patterns.compile(value, where)


def check_path(where: str, value: typing.Any, has_plugins: bool = False) -> None:
    """A path that an operating system accepts."""
    names = value.encode().split(b"/")
    if "\0" in value or len(value.encode()) > LONGEST_PATH or max(map(len, names)) > LONGEST_NAME:
        raise UserError(
            f"{where} = {shown(value)}: is not a path; a name in it has at most {LONGEST_NAME} bytes, and no byte 0"
        )


def check_file(where: str, value: typing.Any, has_plugins: bool = False) -> None:
    """The path of a regular file, or of nothing yet: reading a device never ends, and a FIFO waits for a writer."""
    check_path(where, value)
    if value and files.is_there(value) and not files.is_file(value):
        raise UserError(f"{where} = {shown(value)}: is a folder, a FIFO or a device; name a regular file")


def check_source_path(where: str, value: typing.Any, has_plugins: bool = False) -> None:
    """A path that is not empty."""
    if not value:
        raise UserError(f"{where} = '': is empty; name a file, a folder or a glob")
    check_path(where, value)


def check_folder_name(where: str, value: typing.Any, has_plugins: bool = False) -> None:
    """A name that a folder below runs/ can have."""
    bad = not value or value in (".", "..") or value != value.strip() or not value.isprintable()
    if bad or set(value) & set('/\\:*?"<>|') or len(value.encode()) > LONGEST_NAME:
        raise UserError(
            f"{where} = {shown(value)}: names a folder under runs/; at most {LONGEST_NAME} letters, digits, dots, "
            "dashes and the like, without a slash"
        )


def check_mesh(where: str, value: typing.Any, has_plugins: bool = False) -> None:
    """Sizes of mesh axes: whole numbers of devices, at most one of them -1."""
    axes = catalogue.constant("efficientllm.sharding", "AXES")
    try:
        _, sizes = registry.parse_spec(f"mesh({value})")
    except UserError:
        raise UserError(f"{where} = {shown(value)}: is not a mesh; write sizes of axes: 'data=2, fsdp=-1'") from None
    for axis, size in sizes.items():
        if axis not in axes:
            raise UserError(
                f"{where} = {shown(value)}: no mesh axis {axis!r}; axes: {', '.join(axes)}{did_you_mean(axis, axes)}"
            )
        if type(size) is not int or not (size == -1 or 1 <= size <= 2**20):
            raise UserError(f"{where} = {shown(value)}: {axis} must be a whole number of devices, or -1 for all left")
    if list(sizes.values()).count(-1) > 1:
        raise UserError(f"{where} = {shown(value)}: only one axis may be -1")


def check_block(where: str, value: typing.Any, has_plugins: bool = False) -> None:
    """`mixer` or `mixer | ffn`."""
    if not isinstance(value, str):
        raise UserError(f"{where} = {shown(value)}: is not a block; write 'mixer' or 'mixer | ffn'")
    mixer, bar, ffn = value.partition("|")
    check_spec("mixer", mixer.strip(), where, has_plugins)
    if bar and ffn.strip():
        check_spec("ffn", ffn.strip(), where, has_plugins)


def check_optional_block(where: str, value: typing.Any, has_plugins: bool = False) -> None:
    """A block, or nothing."""
    if value != "":
        check_block(where, value, has_plugins)


def check_remat(where: str, value: typing.Any, has_plugins: bool = False) -> None:
    """`none`, `full`, or a policy of jax.checkpoint_policies. Only the last imports JAX."""
    if value not in ("none", "full"):
        from efficientllm.ops import rematerialization

        rematerialization.policy(value)


def check_hardware(where: str, value: typing.Any, has_plugins: bool = False) -> None:
    """A device of the planner's hardware table."""
    from efficientllm.cost import hardware_table

    hardware_table.find_hardware(value)


def check_baseline(where: str, value: typing.Any, has_plugins: bool = False) -> None:
    """The path of a record.json, a quant spec, or nothing."""
    if value.endswith(".json"):
        check_path(where, value)
    elif value:
        check_spec("quant", value, where, has_plugins)


def tuple_of(element_rule: Rule) -> Rule:
    """A tuple of texts that each pass `element_rule`."""

    def rule(where, value, has_plugins):
        for text in value:
            if not isinstance(text, str):
                raise UserError(f"{where} = {shown(value)}: must be a tuple of texts, not of {type(text).__name__}")
            element_rule(where, text, has_plugins)

    return rule


def accept_text(where: str, value: typing.Any, has_plugins: bool = False) -> None:
    """Any text."""


def check_nonempty(where: str, value: typing.Any, has_plugins: bool = False) -> None:
    """Text that is not empty."""
    if not value:
        raise UserError(f"{where}: holds an empty text; leave it out")


def regex_pairs(what: str, value_rule: Rule) -> Rule:
    """A tuple of (regex, value) pairs whose values pass `value_rule`; `what` names the value in messages."""

    def rule(where, value, has_plugins):
        for pair in value:
            if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)):
                raise UserError(f"{where} = {shown(value)}: must be pairs of (regex, {what}); {shown(pair)} is not")
            check_regex(where, pair[0])
            value_rule(where, pair[1], has_plugins)

    return rule


def number(allowed: ranges.Range) -> Rule:
    """A number in the range `allowed`."""

    def rule(where, value, has_plugins):
        if type(value) not in (int, float):
            raise UserError(f"{where} = {shown(value)}: must be {allowed}")
        ranges.check_range(where, value, allowed)

    return rule


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
    "model.residual": one_of(lambda: ("sequential", "parallel")),
    "model.position": spec("position"),
    "model.norm": spec("norm"),
    "model.precision": spec("precision"),
    "model.attention_kernel": name_of("attention_kernel", "auto"),
    "model.kv_cache": constant("mixers.kv_cache", "KINDS"),
    "model.remat": check_remat,
    "adapter": spec("adapter"),
    "quant": spec("quant"),
    "data": spec("data"),
    "tokenizer": spec("tokenizer", "pretrained"),
    "train.optimizer": spec("optimizer"),
    "train.schedule": spec("schedule"),
    "train.decay": _factors,
    "train.rates": _factors,
    "infer.prompts": tuple_of(accept_text),
    "infer.sampler": spec("sampler"),
    "infer.stop": tuple_of(check_nonempty),
    "infer.rules": regex_pairs("spec", spec("quant")),
    "infer.baseline": check_baseline,
    "plan.hardware": check_hardware,
    "plan.of": name_of("planned"),
    "plan.calibration": check_path,
    "quality.tasks": tuple_of(check_nonempty),
    "quality.include": check_path,
    "quality.results": check_file,
    "metrics.meter": check_file,
}
FIELDS = {
    **{("mixer", kind): spec(kind) for kind in ("position", "norm", "precision")},
    **{("mixer", kind): name_of(kind, "auto") for kind in ("attention_kernel", "scan_kernel", "rwkv_kernel")},
    ("mixer", "block_kernel"): name_of("block_kernel", "auto"),
    ("mixer", "kv_cache"): constant("mixers.kv_cache", "KINDS"),
    ("ffn", "precision"): spec("precision"),
    ("ffn", "scores"): constant("ffns.routing", "SCORES"),
    ("ffn", "dispatch"): constant("ffns.moe", "DISPATCH"),
    ("ffn", "kernel"): name_of("grouped_kernel", "auto"),
    ("position", "scaling"): spec("rope_scaling"),
    ("quant", "method"): constant("quant.int4", "METHODS"),
    ("quant", "embedding"): spec("quant"),
    ("adapter", "target"): check_regex,
    ("data", "path"): check_source_path,
    ("tokenizer", "path"): check_source_path,
}
