"""Which module of the package registers a technique, read from the sources as text and without an import."""

import ast
import functools
import pathlib
import re

PACKAGE = pathlib.Path(__file__).parents[1]
_KINDS = re.compile(r"^KINDS = (\{.*?\})$", re.MULTILINE | re.DOTALL)
_REGISTERED = re.compile(r"^(?:@| *)register\(\s*\"(\w+)\",\s*\"([^\"]+)\"", re.MULTILINE)
_LOOP = re.compile(r"^for (\w+) in (\(.*?\)):\n(?: +.*\n)*? +register\(\"(\w+)\", \1\)", re.MULTILINE)


@functools.cache
def kinds() -> dict[str, tuple[str, ...]]:
    """`{kind: modules and packages that register its names}`, as `KINDS` in the `__init__` of each package declares.

    `KINDS = {"mixer": "*"}` stands for all modules of the package, `{"rope_scaling": "scaling"}` for one.
    """
    homes: dict[str, tuple[str, ...]] = {}
    for file in sorted(PACKAGE.glob("**/__init__.py")):
        if declaration := _KINDS.search(file.read_text("utf-8")):
            package = ".".join(file.parent.relative_to(PACKAGE.parent).parts)
            for kind, module in ast.literal_eval(declaration[1]).items():
                home = package if module == "*" else f"{package}.{module}"
                homes[kind] = (*homes.get(kind, ()), home)
    return homes


@functools.cache
def modules(kind: str) -> tuple[str, ...]:
    """The modules that may register names of `kind`, packages before what is in them."""
    return tuple(module for home in kinds().get(kind, ()) for module in _with_submodules(home))


@functools.cache
def module_by_name(kind: str) -> dict[str, str]:
    """`{name: module}` of the names of `kind` that the sources show; a function may register others."""
    names: dict[str, str] = {}
    for module in modules(kind):
        source = source_file(module).read_text("utf-8")
        registered = _REGISTERED.findall(source)
        for _, values, looped_kind in _LOOP.findall(source):
            registered += [(looped_kind, name) for name in ast.literal_eval(values)]
        names |= {name: module for registered_kind, name in registered if registered_kind == kind}
    return names


def source_file(module: str) -> pathlib.Path:
    """The file of a module or package of this package."""
    path = PACKAGE.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _with_submodules(home):
    folder = PACKAGE.parent.joinpath(*home.split("."))
    stems = [path.stem for path in sorted(folder.glob("*.py")) if path.stem not in ("__init__", "__main__")]
    return [home, *(f"{home}.{stem}" for stem in stems)]
