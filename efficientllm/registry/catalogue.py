"""Names and fields of the package's techniques, read from its sources: known before anything heavy is imported.

The registry knows the same once a kind's modules are imported, and techniques from elsewhere too.
"""

import ast
import functools
import pathlib
import typing

from efficientllm import registry

ROOT = pathlib.Path(__file__).parents[1]


class Entry(typing.NamedTuple):
    """A technique: its fields as `{name: Field}`, None where the source does not tell."""

    fields: dict | None


class Field(typing.NamedTuple):
    """A field of a spec: the name of its type, None without one, and whether a value must be given."""

    type: str | None
    required: bool


@functools.cache
def entries(kind):
    """`{name: Entry}` of a kind."""
    if kind == "size":  # its names are made by a function, and its module imports nothing
        return {name: Entry(_of_signature(registry.lookup("size", name))) for name in registry.names("size")}
    found = {}
    for module in _modules(registry.kinds()[kind]):
        source = _path(module).read_text("utf-8")
        if f'"{kind}"' in source or "@register" in source:
            found |= _registered(module, kind)
    return dict(sorted(found.items()))


def constant(module, name):
    """The literal that a module of the package assigns to `name` at its top."""
    for node in _tree(module).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return _keys(node.value) if isinstance(node.value, ast.Dict) else ast.literal_eval(node.value)
    raise LookupError(f"{module} assigns no {name}")


def _keys(node):
    return tuple(ast.literal_eval(key) for key in node.keys)


def _path(module):
    path = ROOT.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _modules(home):
    """A kind's home and the modules in it, as the registry imports them."""
    folder = ROOT.parent.joinpath(*home.split("."))
    inside = [f"{home}.{path.stem}" for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]
    return [home, *(module for module in inside if not module.endswith("__main__"))]


@functools.cache
def _tree(module):
    return ast.parse(_path(module).read_text("utf-8"))


def _registered(module, kind):
    """`{name: Entry}` of what a module registers under `kind`."""
    found = {}
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            for call in node.decorator_list:
                if (name := _name(call, kind, node)) is not None:
                    fields = _parameters(node) if isinstance(node, ast.FunctionDef) else class_fields(module, node.name)
                    found[name] = Entry(fields)
        elif isinstance(node, ast.Call) and (name := _name(node.func, kind)) is not None:
            found[name] = Entry(None)
        elif isinstance(node, ast.For):
            found |= {name: Entry(None) for name in _loop_names(node, kind)}
    return found


def _name(call, kind, decorated=None):
    """`name` of `register(kind, name)`, or None."""
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "register"):
        return None
    if len(call.args) < 2 or not all(isinstance(arg, ast.Constant) for arg in call.args[:2]):
        return None
    given, name = (arg.value for arg in call.args[:2])
    return name if given == kind else None


def _loop_names(loop, kind):
    """Names of `for name in (...): register(kind, name)(...)`."""
    for node in ast.walk(loop):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "register":
            given, name = node.args[:2]
            if isinstance(given, ast.Constant) and given.value == kind and isinstance(name, ast.Name):
                return ast.literal_eval(loop.iter)
    return ()


def class_fields(module, name):
    """`{field: Field}` of a dataclass or flax module, its bases of the package included."""
    tree = _tree(module)
    node = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)
    if node is None:
        return _imported_fields(tree, name)
    fields = {}
    for base in reversed(node.bases):
        if isinstance(base, ast.Name):
            fields |= class_fields(module, base.id)
        elif isinstance(base, ast.Attribute) and (home := _imported_module(tree, base.value.id)):
            fields |= class_fields(home, base.attr)
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and not _is_fixed(line):
            fields[line.target.id] = Field(ast.unparse(line.annotation), line.value is None)
    return fields


def _is_fixed(line):
    """Whether a line declares what no spec may set: a ClassVar, or a field that is not initialised."""
    is_fixed = line.value is not None and "init=False" in ast.unparse(line.value)
    return is_fixed or "ClassVar" in ast.unparse(line.annotation)


def _imported_module(tree, name):
    """The module of the package that `name` is, by `from package import name`, or None."""
    for node in tree.body:
        if _is_ours(node) and any(name == (alias.asname or alias.name) for alias in node.names):
            return f"{node.module}.{name}"
    return None


def _is_ours(node):
    return isinstance(node, ast.ImportFrom) and (node.module or "").startswith("efficientllm")


def _imported_fields(tree, name):
    for node in tree.body:
        if _is_ours(node):
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return class_fields(node.module, alias.name)
    return {}


def _parameters(node):
    given = node.args.posonlyargs + node.args.args
    defaults = [None] * (len(given) - len(node.args.defaults)) + node.args.defaults
    pairs = [*zip(given, defaults, strict=True), *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
    fields = {a.arg: Field(ast.unparse(a.annotation) if a.annotation else None, d is None) for a, d in pairs}
    return {} if "parent" in fields else fields  # a flax module's own two


def _of_signature(target):
    return {
        key: Field(registry.type_name(parameter.annotation), parameter.default is parameter.empty)
        for key, parameter in registry.settable(target).items()
    }
