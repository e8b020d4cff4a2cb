"""Spec strings: `"name(key=value, ...)"` resolved to the object registered under (kind, name).

A kind's modules are imported when the first of its names is looked up, so that registering is all a new file has to do.
Files outside the package come in through `config.imports`.
"""

import ast
import functools
import importlib
import inspect
import pathlib
import pkgutil
import re
import typing
import warnings

from efficientllm.errors import UserError, did_you_mean, shown
from efficientllm.registry import ranges

_PACKAGE = pathlib.Path(__file__).parents[1]
_KINDS = re.compile(r"^KINDS = (\{.*?\})$", re.MULTILINE | re.DOTALL)
_REGISTRY: dict[tuple[str, str], typing.Any] = {}
_EXAMPLES: dict[tuple[str, str], str] = {}
_RANGES: dict[tuple[str, str], dict[str, ranges.Range]] = {}
_SPEC = re.compile(r"\s*([\w.-]+)\s*(?:\((.*)\))?\s*", re.DOTALL)  # names such as 0.5b are no identifiers


def register(kind, name, example=None, ranges=None):
    """Decorator that makes a class or function available as the spec `name` of `kind`.

    `example` is a whole spec for a technique with fields that no model gives; it is what the contract suite builds.
    `ranges` are those of numbers, `{"window": ranges.whole(1)}`: a spec with another value is refused.
    """

    def add(target):
        key = (kind, name)
        held = _REGISTRY.setdefault(key, target)
        if held is not target:
            raise KeyError(f"{kind} {name!r} is registered twice: {_origin(held)} and {_origin(target)}")
        _EXAMPLES[key] = example or name
        _RANGES[key] = ranges or {}
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
        with warnings.catch_warnings():  # a regex is no wrong escape
            warnings.simplefilter("ignore")
            call = ast.parse(f"_({arguments or ''})", mode="eval").body
        values = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        is_call = isinstance(call, ast.Call) and isinstance(call.func, ast.Name)  # not of a call, as in a()(b=1)
        if not is_call or call.args or None in values or len(values) < len(call.keywords):
            raise ValueError("positional or repeated")
        return name, values
    except (SyntaxError, ValueError, AttributeError, TypeError, RecursionError, MemoryError):
        raise UserError(f"{where} = {shown(spec)} is not a spec; write 'name' or 'name(key=value, ...)'") from None


def lookup(kind, name, where="spec"):
    """The object registered as (kind, name). Raises UserError that lists the known names."""
    check_name(kind, name, names(kind), where)
    return _REGISTRY[kind, name]


def check_name(kind, name, known, where):
    """Raises UserError that lists the `known` names unless `name` is one of them."""
    if name not in known:
        raise UserError(
            f"{where} = {shown(name)}: no {kind} of that name; known: {', '.join(known)}{did_you_mean(name, known)}"
        )


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
        raise UserError(f"{where} = {shown(spec)}: {kind} {name!r} needs a value for {', '.join(missing)}")
    return target(**values)


def _resolve(kind, spec, where):
    name, given = parse(spec, where)
    target = lookup(kind, name, where)
    types = {key: type_name(field.annotation) for key, field in settable(target).items()}
    check_fields(kind, name, given, types, f"{where} = {shown(spec)}", _ranges(kind, name, target))
    return name, target, given


def check_fields(kind, name, given, types, where, allowed):
    """Raises UserError for a field that a technique has not, a value of another type or out of its range.

    `types` are names of types by field, `allowed` the ranges of numbers by field.
    """
    for key, value in given.items():
        if key not in types:
            raise UserError(
                f"{where}: {kind} {name!r} has no field {key!r}; "
                f"fields: {', '.join(types) or 'none'}{did_you_mean(key, types)}"
            )
        _check_type(where, key, value, types[key])
        if type(value) in (int, float) or key in allowed:
            ranges.check(f"{where}: {key}", value, allowed.get(key, ranges.FINITE))


def _ranges(kind, name, target):
    """Those it was registered with, and the package's of fields that are the package's, inherited ones too."""
    target = getattr(target, "func", target)  # of a partial
    classes = [cls for cls in getattr(target, "__mro__", ()) if cls.__module__.startswith("efficientllm.")]
    inherited = {key for cls in classes for key in getattr(cls, "__annotations__", ())}
    is_ours = inspect.isfunction(target) and target.__module__.startswith("efficientllm.")
    table = ranges.FIELDS.get(kind, {})
    return {key: range for key, range in table.items() if is_ours or key in inherited} | _RANGES.get((kind, name), {})


def _inherited(target, defaults):
    return {key: defaults[key] for key in settable(target) if defaults.get(key) is not None}


def settable(target):
    """The parameters that a spec of `target` may set, by name."""
    fields = dict(inspect.signature(target).parameters)
    if "parent" in fields:  # a flax module's own two
        del fields["parent"], fields["name"]
    return fields


TYPES = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,), "tuple": (tuple, list)}


def type_name(annotation):
    """The name of a field's type."""
    return getattr(annotation, "__name__", str(annotation))


def _check_type(where, key, value, name):
    allowed = TYPES.get(name)
    if allowed and (not isinstance(value, allowed) or (isinstance(value, bool) and name != "bool")):
        raise UserError(f"{where}: {key} must be {name}, not {shown(value)}")


@functools.cache
def kinds():
    """`{kind: module or package that registers its names}`, as `KINDS` in the `__init__` of each package declares it.

    `KINDS = {"mixer": "*"}` is all modules of the package, `{"rope_scaling": "scaling"}` that one. The declarations are
    read, not imported: which techniques there are is told before JAX is imported.
    """
    homes = {}
    for file in sorted(_PACKAGE.glob("**/__init__.py")):
        if literal := _KINDS.search(file.read_text("utf-8")):
            package = ".".join(file.parent.relative_to(_PACKAGE.parent).parts)
            for kind, module in ast.literal_eval(literal[1]).items():
                homes[kind] = package if module == "*" else f"{package}.{module}"
    return homes


def _discover(kind):
    if home := kinds().get(kind):
        module = importlib.import_module(home)
        for info in pkgutil.iter_modules(getattr(module, "__path__", ())):
            importlib.import_module(f"{home}.{info.name}")


def _origin(target):
    return getattr(target, "__qualname__", repr(target))
