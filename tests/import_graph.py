"""The import graph of efficientllm: its rooms (packages and top modules), cycles, and levels."""

import ast
import graphlib
import itertools
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]


def modules():
    """`{module name: path}` of the package; a package is its `__init__`."""
    paths = sorted((ROOT / "efficientllm").rglob("*.py"))
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths)
    return {name.removesuffix(".__init__"): path for name, path in zip(names, paths, strict=True)}


def imports():
    """`{module: {modules that it imports, anywhere in its file but for type checkers alone}}`."""
    module_names = modules()
    return {
        name: set(_imported(ast.parse(path.read_text()), module_names)) - {name} for name, path in module_names.items()
    }


def _imported(tree, module_names):
    for node in _run(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in module_names)
        elif isinstance(node, ast.ImportFrom) and node.module in module_names:
            full = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in module_names else node.module for name in full)


def _run(node):
    """The nodes of a tree without the bodies of `if typing.TYPE_CHECKING`."""
    yield node
    is_for_checkers = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    for child in node.orelse if is_for_checkers else ast.iter_child_nodes(node):
        yield from _run(child)


def room(module):
    """The package or the top module of `module`."""
    return module.split(".")[1] if "." in module else module


def rooms(graph):
    """`{room: {rooms it imports from}}` of the graph of modules."""
    arrows = {room(module): set() for module in graph if module != "efficientllm"}
    for module, target in ((module, target) for module, targets in graph.items() for target in targets):
        if room(module) != room(target):
            arrows[room(module)].add(room(target))
    return arrows


def directories(graph):
    """`{directory: {directories it imports from}}` of the graph of modules; a top module is a directory of its own."""
    packages = {name for name, path in modules().items() if path.name == "__init__.py"}
    arrows = {}
    for module, targets in graph.items():
        source, *others = (_directory(name, packages) for name in (module, *targets))
        arrows.setdefault(source, set()).update(set(others) - {source})
    return arrows


def _directory(module, packages):
    parent = module.rpartition(".")[0]
    return module if module in packages or parent == "efficientllm" else parent


def cycle(graph):
    """A cycle as a list of names, empty without one."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1][::-1]
    return []


def levels(arrows):
    """Lists of rooms from the top: a room lies one level below the lowest that imports it. Raises CycleError.

    Techniques that no room imports, since a spec names them, lie one level above what they import.
    """
    order = list(graphlib.TopologicalSorter(arrows).static_order())[::-1]
    depth = dict.fromkeys(order, 0)
    for name in order:
        for target in arrows[name]:
            depth[target] = max(depth[target], depth[name] + 1)
    for name in set(order).difference(*arrows.values()):
        if _holds_techniques(name) and arrows[name]:
            depth[name] = min(depth[target] for target in arrows[name]) - 1
    in_order = sorted(arrows, key=lambda name: (depth[name], name))
    return [list(group) for _, group in itertools.groupby(in_order, depth.get)]


def _holds_techniques(name):
    package = ROOT / "efficientllm" / name / "__init__.py"
    return package.exists() and re.search("^KINDS = ", package.read_text(), re.MULTILINE)


def reduced(arrows):
    """The arrows without those that follow from others (transitive reduction)."""
    below = {}
    for name in graphlib.TopologicalSorter(arrows).static_order():
        below[name] = arrows[name].union(*(below[target] for target in arrows[name]))
    return {
        name: {target for target in targets if not any(target in below[other] for other in targets)}
        for name, targets in arrows.items()
    }
