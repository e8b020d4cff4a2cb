"""Registry of techniques: a spec string `"name(key=value, ...)"` becomes the object registered under (kind, name).

A kind is a role in a run: `mixer`, `ffn`, `optimizer`, `data`, ... A module that registers a name is imported when that
is first looked up, so a new technique only has to register itself. Files outside the package are listed in
`config.imports`.
"""

import ast
import importlib
import inspect
import re
import threading
import typing
import warnings

from efficientllm.errors import UserError, did_you_mean, short_repr
from efficientllm.registry import ranges, technique_modules
from efficientllm.registry.technique_modules import kinds as kinds

SPEC_TYPES = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "tuple": (tuple, list),
    "bool | str": (bool, str),
    "int | tuple": (int, tuple, list),
}
_SPEC = re.compile(r"\s*([\w.-]+)\s*(?:\((.*)\))?\s*", re.DOTALL)  # names such as 0.5b are not identifiers
Target = typing.Any  # a registered class or function
Values = dict[str, typing.Any]  # the fields that a spec sets
Key = tuple[str, str]  # (kind, name)
_REGISTRY: dict[Key, Target] = {}
_EXAMPLES: dict[Key, str] = {}
_RANGES: dict[Key, ranges.Ranges] = {}
Choices = dict[str, tuple[str, ...]]  # the allowed texts by field
_CHOICES: dict[Key, Choices] = {}
# Threads that read data parse specs too. Two parsers at once raise SystemError before Python 3.11.8 (CPython's
# gh-106905), and filters of warnings are those of the whole process.
_PARSING = threading.Lock()


def register(
    kind: str,
    name: str,
    example: str | None = None,
    ranges: ranges.Ranges | None = None,
    choices: Choices | None = None,
) -> typing.Callable[[Target], Target]:
    """Decorator that makes a class or function available as the spec `name` of `kind`.

    Args:
      example: a complete spec, for a technique with fields that no model fills in. The contract suite builds it.
      ranges: the allowed numbers by field, `{"window": ranges.whole(1)}`. Specs outside of them are refused.
      choices: the allowed texts by field, `{"gate": ("sigmoid", "tanh")}`. Specs with another are refused, and the
        contract suite tries all.
    """

    def add(target):
        key = (kind, name)
        registered = _REGISTRY.setdefault(key, target)
        if registered is not target:
            raise KeyError(f"{kind} {name!r} is registered twice: {_origin(registered)} and {_origin(target)}")
        _EXAMPLES[key] = example or name
        _RANGES[key] = ranges or {}
        _CHOICES[key] = choices or {}
        return target

    return add


def example_spec(kind: str, name: str) -> str:
    """A spec of the technique `name` that a model can build."""
    lookup(kind, name)
    return _EXAMPLES[kind, name]


def choices(kind: str, name: str) -> Choices:
    """The allowed texts of the fields of the technique `name`, as it is registered with them."""
    lookup(kind, name)
    return _CHOICES[kind, name]


def names(kind: str) -> list[str]:
    """Sorted names registered under `kind`."""
    _import_modules(kind)
    return sorted(name for registered_kind, name in _REGISTRY if registered_kind == kind)


def parse_spec(spec: str, where: str = "spec") -> tuple[str, Values]:
    """`"nsa(window=512)"` -> `("nsa", {"window": 512})`. Raises UserError for anything that is not a spec string."""
    match = _SPEC.fullmatch(spec) if isinstance(spec, str) else None
    try:
        name, arguments = match.groups()
        with _PARSING, warnings.catch_warnings():  # a regex in a spec holds escapes that Python warns about
            warnings.simplefilter("ignore")
            call: typing.Any = ast.parse(f"_({arguments or ''})", mode="eval").body
        values = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        is_call = isinstance(call, ast.Call) and isinstance(call.func, ast.Name)  # refuses a call of a call, a()(b=1)
        if not is_call or call.args or None in values or len(values) < len(call.keywords):
            raise ValueError("positional or repeated")
        return name, values
    except (SyntaxError, ValueError, AttributeError, TypeError, RecursionError, MemoryError):
        raise UserError(
            f"{where} = {short_repr(spec)}: is not a spec; write 'name' or 'name(key=value, ...)'"
        ) from None


def lookup(kind: str, name: str, where: str = "spec") -> Target:
    """The object registered as (kind, name). Raises UserError that lists the registered names."""
    if module := technique_modules.module_by_name(kind).get(name):
        importlib.import_module(module)  # also where the name is known: two of one name are an error
    if (kind, name) not in _REGISTRY:
        check_name(kind, name, names(kind), where)
    return _REGISTRY[kind, name]


def check_name(kind: str, name: str, allowed: typing.Collection[str], where: str) -> None:
    """Raises UserError that lists the `allowed` names unless `name` is one of them."""
    if name not in allowed:
        raise UserError(
            f"{where} = {short_repr(name)}: no {kind} of that name; known: {', '.join(allowed)}"
            f"{did_you_mean(name, allowed)}"
        )


def complete_spec(kind: str, spec: str, defaults: Values, where: str | None = None) -> str:
    """Fills the fields that a spec leaves open from `defaults`, so that no model is needed to build it.

    Raises UserError as `build` does, except for missing fields.
    """
    name, target, values = _resolve(kind, spec, where or f"{kind} spec")
    values = {**_inherited(target, defaults), **values}
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in values.items())})"


def format_spec(name: str, fields: Values) -> str:
    """Formats a spec: `name(key=value, ...)`."""
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in fields.items())})" if fields else name


def build(
    kind: str, spec: str, defaults: Values | None = None, where: str | None = None, **fixed: typing.Any
) -> typing.Any:
    """Instantiates the technique that `spec` names.

    Each parameter takes its value from the spec, else from `fixed`, else from `defaults`. `defaults` is how a module
    inherits from the model (`num_heads`, `hidden`, ...): by the name of its field. Raises UserError for an unknown
    name, an unknown or missing key, and a value of the wrong type or out of range. `where` begins each message.
    """
    where = where or f"{kind} spec"
    name, target, values = _resolve(kind, spec, where)
    values = {**_inherited(target, defaults or {}), **fixed, **values}
    required = [key for key, field in spec_parameters(target).items() if field.default is inspect.Parameter.empty]
    if missing := [key for key in required if key not in values]:
        raise UserError(f"{where} = {short_repr(spec)}: {kind} {name!r} needs a value for {', '.join(missing)}")
    return target(**values)


def _resolve(kind, spec, where):
    """`(name, registered object, fields that the spec sets)`. Raises UserError."""
    name, values = parse_spec(spec, where)
    target = lookup(kind, name, where)
    types = {key: type_name(field.annotation) for key, field in spec_parameters(target).items()}
    check_fields(kind, name, values, types, f"{where} = {short_repr(spec)}", _field_ranges(kind, name, target))
    for field, allowed in _CHOICES.get((kind, name), {}).items():
        if field in values and values[field] not in allowed:
            hint = f"{', '.join(allowed)}{did_you_mean(values[field], allowed)}"
            raise UserError(f"{where} = {short_repr(spec)}: {field} = {short_repr(values[field])} is none of {hint}")
    return name, target, values


def check_fields(
    kind: str, name: str, values: Values, types: dict[str, str | None], where: str, allowed: ranges.Ranges
) -> None:
    """Raises UserError for an unknown field, a value of another type, or a number out of its range.

    `types` maps each field of the technique to the name of its type, `allowed` its numbers to their ranges.
    """
    for key, value in values.items():
        if key not in types:
            raise UserError(
                f"{where}: {kind} {name!r} has no field {key!r}; "
                f"fields: {', '.join(types) or 'none'}{did_you_mean(key, types)}"
            )
        _check_type(where, key, value, types[key])
        if type(value) in (int, float) or key in allowed:
            ranges.check_range(f"{where}: {key}", value, allowed.get(key, ranges.FINITE))


def _field_ranges(kind, name, target):
    """The ranges a technique was registered with. Fields that this package declares also have those of `ranges`."""
    target = getattr(target, "func", target)  # unwraps a functools.partial
    bases = [base for base in getattr(target, "__mro__", ()) if base.__module__.startswith("efficientllm.")]
    declared = {key for base in bases for key in getattr(base, "__annotations__", ())}
    is_package_function = inspect.isfunction(target) and target.__module__.startswith("efficientllm.")
    table = ranges.FIELDS.get(kind, {})
    package_ranges = {key: allowed for key, allowed in table.items() if is_package_function or key in declared}
    return package_ranges | _RANGES.get((kind, name), {})


def _inherited(target, defaults):
    return {key: defaults[key] for key in spec_parameters(target) if defaults.get(key) is not None}


def spec_parameters(target: Target) -> dict[str, inspect.Parameter]:
    """The parameters that a spec of `target` may set, by name."""
    parameters = dict(inspect.signature(target).parameters)
    if "parent" in parameters:  # every flax module has these two
        del parameters["parent"], parameters["name"]
    return parameters


def type_name(annotation: typing.Any) -> str:
    """The name of a field's type, such as `"int"`."""
    return getattr(annotation, "__name__", str(annotation))


def _check_type(where, key, value, name):
    allowed = SPEC_TYPES.get(name)
    if allowed and (not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed)):
        raise UserError(f"{where}: {key} = {short_repr(value)}: must be {name.replace(' | ', ' or ')}")


def _import_modules(kind):
    """Imports every module that registers names of `kind`."""
    for module in technique_modules.modules(kind):
        importlib.import_module(module)


def _origin(target):
    return getattr(target, "__qualname__", repr(target))
