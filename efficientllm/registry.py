"""Spec strings: `"name(key=value, ...)"` resolved to the object registered under (kind, name).

A kind's modules are imported when the first of its names is looked up, so that registering is all a new file has to do.
Files outside the package come in through `config.imports`.
"""

import ast
import importlib
import inspect
import pkgutil
import re

from efficientllm.errors import UserError, did_you_mean

# Where each kind lives: a package whose modules are all imported, or a single module.
HOMES = {
    "mixer": "efficientllm.mixers",
    "ffn": "efficientllm.ffns",
    "position": "efficientllm.positions",
    "rope_scaling": "efficientllm.positions",
    "norm": "efficientllm.layers",
    "attention_kernel": "efficientllm.attention",
    "scan_kernel": "efficientllm.mixers",
    "grouped_kernel": "efficientllm.grouped_matmul",
    "rwkv_kernel": "efficientllm.mixers.rwkv_kernels",
    "block_kernel": "efficientllm.block_attention",
    "precision": "efficientllm.weights",
    "quant": "efficientllm.quant",
    "size": "efficientllm.sizes",
    "optimizer": "efficientllm.optim",
    "schedule": "efficientllm.optim",
    "data": "efficientllm.data",
    "tokenizer": "efficientllm.data",
    "sampler": "efficientllm.infer",
    "task": "efficientllm.tasks",
    "planned": "efficientllm.plan",
    "adapter": "efficientllm.adapters",
}
_REGISTRY = {}
_EXAMPLES = {}
_SPEC = re.compile(r"\s*([\w.-]+)\s*(?:\((.*)\))?\s*", re.DOTALL)  # names such as 0.5b are no identifiers


def register(kind, name, example=None):
    """Decorator that makes a class or function available as the spec `name` of `kind`.

    `example` is a whole spec for a technique with fields that no model gives; it is what the contract suite builds.
    """

    def add(target):
        key = (kind, name)
        held = _REGISTRY.setdefault(key, target)
        if held is not target:
            raise KeyError(f"{kind} {name!r} is registered twice: {_origin(held)} and {_origin(target)}")
        _EXAMPLES[key] = example or name
        return target

    return add


def example(kind, name):
    """A spec of `name` that a model can build."""
    lookup(kind, name)
    return _EXAMPLES[kind, name]


def names(kind):
    """Sorted names registered under `kind`."""
    _discover(kind)
    return sorted(name for known, name in _REGISTRY if known == kind)


def parse(spec, where="spec"):
    """`"nsa(window=512)"` -> `("nsa", {"window": 512})`. Raises UserError for anything that is not a spec string."""
    match = _SPEC.fullmatch(spec) if isinstance(spec, str) else None
    try:
        name, arguments = match.groups()
        call = ast.parse(f"_({arguments or ''})", mode="eval").body
        values = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        if call.args or len(values) < len(call.keywords):
            raise ValueError("positional or repeated")
        return name, values
    except (SyntaxError, ValueError, AttributeError):
        raise UserError(f"{where} = {spec!r} is not a spec; write 'name' or 'name(key=value, ...)'") from None


def lookup(kind, name, where="spec"):
    """The object registered as (kind, name). Raises UserError that lists the known names."""
    known = names(kind)
    if name not in known:
        raise UserError(
            f"{where} = {name!r}: no {kind} of that name; known: {', '.join(known)}{did_you_mean(name, known)}"
        )
    return _REGISTRY[kind, name]


def complete(kind, spec, defaults, where=None):
    """The spec with every field filled in that `defaults` knows and it leaves open: one that needs no model to build.

    Raises UserError as `build` does, except for missing fields.
    """
    name, target, given = _resolve(kind, spec, where or f"{kind} spec")
    values = {**_inherited(target, defaults), **given}
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in values.items())})"


def build(kind, spec, defaults=None, where=None, **fixed):
    """Calls what `spec` names with the spec's keywords, then `fixed`, then those `defaults` it has a field for.

    `defaults` is how a module inherits from the model (`num_heads`, `hidden`, ...): by the name of its field, unless
    the spec says otherwise. Raises UserError for an unknown name, an unknown or missing key, or a value of the wrong
    type.
    """
    where = where or f"{kind} spec"
    name, target, given = _resolve(kind, spec, where)
    values = {**_inherited(target, defaults or {}), **fixed, **given}
    required = [key for key, field in settable(target).items() if field.default is inspect.Parameter.empty]
    if missing := [key for key in required if key not in values]:
        raise UserError(f"{where} = {spec!r}: {kind} {name!r} needs a value for {', '.join(missing)}")
    return target(**values)


def _resolve(kind, spec, where):
    name, given = parse(spec, where)
    target = lookup(kind, name, where)
    fields = settable(target)
    for key, value in given.items():
        if key not in fields:
            raise UserError(
                f"{where} = {spec!r}: {kind} {name!r} has no field {key!r}; "
                f"fields: {', '.join(fields) or 'none'}{did_you_mean(key, fields)}"
            )
        _check_type(where, spec, key, value, fields[key].annotation)
    return name, target, given


def _inherited(target, defaults):
    return {key: defaults[key] for key in settable(target) if defaults.get(key) is not None}


def settable(target):
    """The parameters that a spec of `target` may set, by name."""
    fields = dict(inspect.signature(target).parameters)
    if "parent" in fields:  # a flax module's own two
        del fields["parent"], fields["name"]
    return fields


def _check_type(where, spec, key, value, annotation):
    simple = {int: (int,), float: (int, float), str: (str,), bool: (bool,), tuple: (tuple, list)}
    allowed = simple.get(annotation)
    if allowed and (not isinstance(value, allowed) or (isinstance(value, bool) and annotation is not bool)):
        raise UserError(f"{where} = {spec!r}: {key} must be {annotation.__name__}, not {value!r}")


def _discover(kind):
    home = HOMES.get(kind)
    if home is None:
        return
    module = importlib.import_module(home)
    for info in pkgutil.iter_modules(getattr(module, "__path__", ())):
        importlib.import_module(f"{home}.{info.name}")


def _origin(target):
    return getattr(target, "__qualname__", repr(target))
