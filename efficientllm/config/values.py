"""What texts and tuples of the config may be: spec strings, names, regular expressions, paths, pairs of those."""

import functools

from efficientllm import registry
from efficientllm.errors import UserError, did_you_mean, shown
from efficientllm.registry import catalogue, ranges
from efficientllm.untrusted import files, patterns

MODEL = ("norm", "position", "precision", "attention_kernel", "kv_cache", "base", "eps")  # that a model gives its parts
LONGEST_PATH, LONGEST_NAME = 4096, 255  # bytes, on Linux


def check(key, value, where, own=False):
    """Raises UserError unless `value` is what the config's `key` may hold.

    `own` is True where techniques from elsewhere are still to be imported, whose names are not known yet.
    """
    _check_text(where, value)
    if key in KEYS:
        KEYS[key](where, value, own)


def _check_text(where, value):
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, tuple):
            _check_text(where, text)
        elif isinstance(text, str):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UserError(f"{where} = {shown(value)}: is no text (half of a character)") from None


def spec(kind, *also):
    """A spec string of `kind`, or one of `also`."""
    return lambda where, value, own: value in also or check_spec(kind, value, where, own)


def check_spec(kind, text, where, own=False):
    """Raises UserError for a spec string that names no technique, or sets a field to what it may not be."""
    name, given = registry.parse_spec(text, where)
    known = catalogue.entries(kind)
    where = f"{where} = {shown(text)}"
    if own and name not in known:
        registry.check_fields(kind, name, given, dict.fromkeys(given), where, {})
        return
    registry.check_name(kind, name, known, where.partition(" = ")[0])
    fields = known[name].fields
    if fields is None:
        return
    types = {key: field.type for key, field in fields.items()}
    registry.check_fields(kind, name, given, types, where, ranges.FIELDS.get(kind, {}))
    for key, value in given.items():
        if (kind, key) in FIELDS:
            FIELDS[kind, key](f"{where}: {key}", value, own)
    _check_missing(kind, name, fields, given, where)


def _check_missing(kind, name, fields, given, where):
    inherited = {"schedule": ("steps",), "size": ()}.get(kind, (*MODEL, *catalogue.entries("size")["custom"].fields))
    missing = [key for key, field in fields.items() if field.required and key not in given and key not in inherited]
    if missing:
        raise UserError(f"{where}: {kind} {name!r} needs a value for {', '.join(missing)}")


def name_of(kind, *also):
    """The name of a technique that has no fields, or one of `also`."""

    def check(where, value, own):
        known = [*also, *catalogue.entries(kind)]
        if not (own and value not in known):
            registry.check_name(kind, value, known, where)

    return check


def one_of(known):
    """One of the texts that `known()` returns."""

    def check(where, value, own):
        if value not in known():
            raise UserError(
                f"{where} = {shown(value)}: is none of {', '.join(known())}{did_you_mean(str(value), known())}"
            )

    return check


def constant(module, name):
    """One of the texts in a constant of a module of the package."""
    return one_of(functools.partial(catalogue.constant, f"efficientllm.{module}", name))


def regex(where, value, own=False):
    """A regular expression."""
    patterns.compile(value, where)


def path(where, value, own=False):
    """A path that a system can have."""
    names = value.encode().split(b"/")
    if "\0" in value or len(value.encode()) > LONGEST_PATH or max(map(len, names)) > LONGEST_NAME:
        raise UserError(
            f"{where} = {shown(value)}: is no path; a name in it has at most {LONGEST_NAME} bytes, and no byte 0"
        )


def file(where, value, own=False):
    """A path at which there is a regular file, or nothing yet: a device has no end, and a FIFO waits for a writer."""
    path(where, value)
    if value and files.is_there(value) and not files.is_file(value):
        raise UserError(f"{where} = {shown(value)}: is a folder, a FIFO or a device, not a file")


def source(where, value, own=False):
    """A path that is not empty."""
    if not value:
        raise UserError(f"{where} is empty")
    path(where, value)


def folder_name(where, value, own=False):
    """A name that a folder of runs can have."""
    bad = not value or value in (".", "..") or value != value.strip() or not value.isprintable()
    if bad or set(value) & set('/\\:*?"<>|') or len(value.encode()) > LONGEST_NAME:
        raise UserError(
            f"{where} = {shown(value)}: names a folder under runs/: at most {LONGEST_NAME} letters, digits, dots, "
            "dashes and the like, without a slash"
        )


def mesh(where, value, own=False):
    """Sizes of mesh axes: whole numbers of devices, of which one may be -1."""
    axes = catalogue.constant("efficientllm.sharding", "AXES")
    try:
        _, given = registry.parse_spec(f"mesh({value})")
    except UserError:
        raise UserError(f"{where} = {shown(value)}: is no mesh; write sizes of axes: 'data=2, fsdp=-1'") from None
    for axis, size in given.items():
        if axis not in axes:
            raise UserError(
                f"{where} = {shown(value)}: no mesh axis {axis!r}; axes: {', '.join(axes)}{did_you_mean(axis, axes)}"
            )
        if type(size) is not int or not (size == -1 or 1 <= size <= 2**20):
            raise UserError(f"{where} = {shown(value)}: {axis} is a whole number of devices, or -1 for all left")
    if list(given.values()).count(-1) > 1:
        raise UserError(f"{where} = {shown(value)}: only one axis may be -1")


def block(where, value, own=False):
    """`mixer` or `mixer | ffn`."""
    if not isinstance(value, str):
        raise UserError(f"{where}: {shown(value)} is no block; write 'mixer' or 'mixer | ffn'")
    mixer, bar, ffn = value.partition("|")
    check_spec("mixer", mixer.strip(), where, own)
    if bar and ffn.strip():
        check_spec("ffn", ffn.strip(), where, own)


def remat(where, value, own=False):
    """`none`, `full` or a policy of jax, which only then is imported."""
    if value not in ("none", "full"):
        from efficientllm.ops import rematerialization as remat

        remat.policy(value)


def hardware(where, value, own=False):
    """Hardware of the planner's table."""
    from efficientllm.cost import hardware_table

    hardware_table.entry(value)


def baseline(where, value, own=False):
    """A row's file, a form of weights, or nothing."""
    if value.endswith(".json"):
        path(where, value)
    elif value:
        check_spec("quant", value, where, own)


def each(rule):
    """A tuple of texts that pass `rule`."""

    def check(where, value, own):
        for text in value:
            if not isinstance(text, str):
                raise UserError(f"{where} = {shown(value)}: must be a tuple of texts, not of {type(text).__name__}")
            rule(where, text, own)

    return check


def text(where, value, own=False):
    """Any text."""


def something(where, value, own=False):
    """Text that is not empty."""
    if not value:
        raise UserError(f"{where}: one of its texts is empty; leave it out")


def pairs(what, rule):
    """A tuple of (regex, value) pairs whose values pass `rule`."""

    def check(where, value, own):
        for pair in value:
            if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)):
                raise UserError(f"{where} = {shown(value)}: must be pairs of (regex, {what}); {shown(pair)} is none")
            regex(where, pair[0])
            rule(where, pair[1], own)

    return check


def number(allowed):
    """A number in the range `allowed`."""

    def check(where, value, own):
        if type(value) not in (int, float):
            raise UserError(f"{where}: {shown(value)} must be {allowed}")
        ranges.check_range(where, value, allowed)

    return check


_factors = pairs("number", number(ranges.real(0)))
KEYS = {
    "name": folder_name,
    "task": name_of("task"),
    "imports": each(something),
    "mesh": mesh,
    "model.pretrained": path,
    "model.size": spec("size"),
    "model.mixer": spec("mixer"),
    "model.ffn": spec("ffn"),
    "model.pattern": each(block),
    "model.parameters_of": lambda where, value, own: value == "" or block(where, value, own),
    "model.residual": one_of(lambda: ("sequential", "parallel")),
    "model.position": spec("position"),
    "model.norm": spec("norm"),
    "model.precision": spec("precision"),
    "model.attention_kernel": name_of("attention_kernel", "auto"),
    "model.kv_cache": constant("mixers.kv_cache", "KINDS"),
    "model.remat": remat,
    "adapter": spec("adapter"),
    "quant": spec("quant"),
    "data": spec("data"),
    "tokenizer": spec("tokenizer", "pretrained"),
    "train.optimizer": spec("optimizer"),
    "train.schedule": spec("schedule"),
    "train.decay": _factors,
    "train.rates": _factors,
    "infer.prompts": each(text),
    "infer.sampler": spec("sampler"),
    "infer.stop": each(something),
    "infer.rules": pairs("spec", spec("quant")),
    "infer.baseline": baseline,
    "plan.hardware": hardware,
    "plan.of": name_of("planned"),
    "plan.calibration": path,
    "quality.tasks": each(something),
    "quality.include": path,
    "quality.results": file,
    "metrics.meter": file,
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
    ("adapter", "target"): regex,
    ("data", "path"): source,
    ("tokenizer", "path"): source,
}
