"""Public functions, methods and dataclass fields are annotated, but for packages that are still to be done."""

import ast
import pathlib

import pytest

import efficientllm

pytestmark = pytest.mark.quick
ROOT = pathlib.Path(efficientllm.__file__).parent
# Shrinks: a package leaves this list when its public functions are annotated, and cannot come back.
UNFINISHED = ()


def public_functions(tree):
    """The public functions of a module and the public methods, and `__init__`, of its public classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            methods = [method for method in node.body if isinstance(method, ast.FunctionDef)]
            yield from (method for method in methods if not method.name.startswith("_") or method.name == "__init__")


def missing(function):
    """Names of the arguments without an annotation, and `return`."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    bare = [argument.arg for argument in named if argument.annotation is None and argument.arg not in ("self", "cls")]
    return bare + (["return"] if function.returns is None and function.name != "__init__" else [])


def test_finished_packages_annotate_what_is_public():
    lacking = []
    for path in sorted(ROOT.rglob("*.py")):
        top = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if top not in UNFINISHED:
            functions = public_functions(ast.parse(path.read_text("utf-8")))
            lacking += [
                f"{path.relative_to(ROOT)}:{f.lineno} {f.name}: {', '.join(missing(f))}"
                for f in functions
                if missing(f)
            ]
    assert not lacking, "annotate these:\n" + "\n".join(lacking)


def test_packages_that_are_unfinished_exist():
    tops = {path.name.removesuffix(".py") for path in ROOT.iterdir()}
    assert tops >= set(UNFINISHED)
