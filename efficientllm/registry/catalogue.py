"""Static catalogue of techniques: names and fields parsed from the package's sources, without importing JAX.

The registry knows the same once a kind's modules are imported, and also the techniques of `config.imports`.
"""

import ast
import functools
import typing

from efficientllm import registry
from efficientllm.registry import technique_modules


class Entry(typing.NamedTuple):
    """A technique: its fields as `{name: Field}`, None where the source does not show them."""

    fields: "Fields | None"


class Field(typing.NamedTuple):
    """A field of a spec: the name of its type (None if not annotated), and whether it has no default."""

    type: str | None
    required: bool


Fields = dict[str, Field]


class Entries(typing.Mapping[str, Entry]):
    """The techniques of `kind` by name, sorted. The source of one is parsed when its Entry is asked for."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._modules = dict(sorted(technique_modules.module_by_name(kind).items()))

    def __getitem__(self, name: str) -> Entry:
        return _registered(self._modules[name], self._kind)[name]

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def __iter__(self) -> typing.Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


@functools.cache
def entries(kind: str) -> typing.Mapping[str, Entry]:
    """`{name: Entry}` of all techniques of `kind`, sorted by name."""
    if kind == "size":  # a function makes its names; its module is cheap to import
        return {name: Entry(_signature_fields(registry.lookup("size", name))) for name in registry.names("size")}
    return Entries(kind)


def constant(module: str, name: str) -> typing.Any:
    """The literal that a module assigns to `name` at top level; the keys of one that is a dict."""
    for node in _tree(module).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            if isinstance(node.value, ast.Dict):  # its values need not be literals
                return tuple(ast.literal_eval(key) for key in node.value.keys)
            return ast.literal_eval(node.value)
    raise LookupError(f"{module} assigns no {name}")


@functools.cache
def _tree(module):
    return ast.parse(technique_modules.source_file(module).read_text("utf-8"))


@functools.cache
def _registered(module, kind):
    """`{name: Entry}` of what a module registers under `kind`."""
    entries_by_name = {}
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            for call in node.decorator_list:
                if (name := _registered_name(call, kind)) is not None:
                    is_function = isinstance(node, ast.FunctionDef)
                    fields = _function_fields(node) if is_function else class_fields(module, node.name)
                    entries_by_name[name] = Entry(fields)
        elif isinstance(node, ast.Call) and (name := _registered_name(node.func, kind)) is not None:
            entries_by_name[name] = Entry(None)
        elif isinstance(node, ast.For):
            entries_by_name |= {name: Entry(None) for name in _loop_names(node, kind)}
    return entries_by_name


def _registered_name(call, kind):
    """`name` if `call` is `register(kind, name, ...)` with literals, else None."""
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "register"):
        return None
    if len(call.args) < 2 or not all(isinstance(arg, ast.Constant) for arg in call.args[:2]):
        return None
    registered_kind, name = (arg.value for arg in call.args[:2])
    return name if registered_kind == kind else None


def _loop_names(loop, kind):
    """Names of `for name in (...): register(kind, name)(...)`."""
    for node in ast.walk(loop):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "register":
            registered_kind, name = node.args[:2]
            is_literal = isinstance(registered_kind, ast.Constant) and isinstance(name, ast.Name)
            if is_literal and registered_kind.value == kind:
                return ast.literal_eval(loop.iter)
    return ()


def class_fields(module: str, name: str) -> Fields:
    """`{field: Field}` of a dataclass or flax module and of its base classes in this package."""
    tree = _tree(module)
    node = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)
    if node is None:
        return _imported_fields(tree, name)
    fields: Fields = {}
    for base in reversed(node.bases):
        if isinstance(base, ast.Name):
            fields |= class_fields(module, base.id)
        elif isinstance(base, ast.Attribute) and (home := _imported_module(tree, ast.unparse(base.value))):
            fields |= class_fields(home, base.attr)
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and _is_settable(statement):
            fields[statement.target.id] = Field(ast.unparse(statement.annotation), statement.value is None)
    return fields


def _is_settable(field):
    """Whether a spec may set a field: not a ClassVar, nor one declared with `init=False`."""
    is_internal = field.value is not None and "init=False" in ast.unparse(field.value)
    return not is_internal and "ClassVar" not in ast.unparse(field.annotation)


def _imported_module(tree, name):
    """The module of this package that a file imports as `name`, or None."""
    for node in tree.body:
        if _imports_package(node) and any(name == (alias.asname or alias.name) for alias in node.names):
            return f"{node.module}.{name}"
    return None


def _imports_package(node):
    return isinstance(node, ast.ImportFrom) and (node.module or "").startswith("efficientllm")


def _imported_fields(tree, name):
    for node in tree.body:
        if _imports_package(node):
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return class_fields(node.module, alias.name)
    return {}


def _function_fields(node):
    positional = node.args.posonlyargs + node.args.args
    defaults = [None] * (len(positional) - len(node.args.defaults)) + node.args.defaults
    pairs = [*zip(positional, defaults, strict=True), *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
    fields = {a.arg: Field(ast.unparse(a.annotation) if a.annotation else None, d is None) for a, d in pairs}
    return {} if "parent" in fields else fields  # a function that builds a flax module has no fields of its own


def _signature_fields(target):
    return {
        key: Field(registry.type_name(parameter.annotation), parameter.default is parameter.empty)
        for key, parameter in registry.spec_parameters(target).items()
    }
