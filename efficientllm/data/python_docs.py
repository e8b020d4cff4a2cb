"""Documentation and sources of the Python installation: English and Python text without a download."""

import ast
import dataclasses
import functools
import hashlib
import os
import sys
import sysconfig
import typing
from pathlib import Path

from efficientllm.data import cache
from efficientllm.data.base import Source
from efficientllm.errors import FieldError
from efficientllm.registry import register

# Tests, applications, packages that are not the standard library's, and generated tables.
_SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "idlelib", "turtledemo", "site-packages", "dist-packages", "__pycache__",
    "encodings", "ensurepip", "pydoc_data",
}  # fmt: skip
_SKIPPED_FILES = {"html/entities.py", "stringprep.py"}
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")


KINDS = ("all", "topics", "sources", "docstrings")


@dataclasses.dataclass(frozen=True)
class PythonText(Source):
    """Base class of sources that read what the Python installation carries."""

    held_out: float = 0.05
    max_bytes: int = 16_000_000

    def key(self) -> str:
        """Changes with the Python version, a file of its library, or a field."""
        return f"{self} {sys.version} {cache.stat_key(_modules())}"


@register("data", "python_docs", choices={"kind": KINDS})
@dataclasses.dataclass(frozen=True)
class PythonDocs(PythonText):
    """Language topics (pydoc_data), standard-library sources, and the docstrings of each module as one document.

    No module is imported: sources are read and parsed. A module's docstrings stand in its source too, so both go to
    the same side of the split. Above `max_bytes` of text, modules and topics are kept in the order of their hashes.
    Of one `kind`, the sides of the split are those of all kinds together.
    """

    kind: str = "all"

    def documents(self) -> typing.Iterator[tuple[str, str]]:
        """Yields (text, what decides its side of the split) in a fixed order. Raises UserError if there is no text."""
        yield from _documents(self.kind, self.max_bytes)


@functools.lru_cache(maxsize=1)
def _documents(kind, max_bytes):
    sources = [(topic, None) for topic in _topics()] if kind in ("all", "topics") else []
    if kind != "topics":
        sources += [(path.read_text(encoding="utf-8"), _module_name(path)) for path in _modules()]
    if not sources:
        carried = {"all": "neither pydoc_data nor module sources", "topics": "no pydoc_data"}.get(kind)
        raise FieldError("data", f"this Python carries {carried or 'no module sources'}; use text(path='...')")
    texts_by_index, total = {}, 0
    for index in sorted(range(len(sources)), key=lambda index: _rank(sources[index][0])):
        texts = _texts(kind, *sources[index])
        total += sum(len(text.encode()) for text in texts)
        if total > max_bytes:
            break
        texts_by_index[index] = texts
    return [
        (text, sources[index][0]) for index, texts in sorted(texts_by_index.items()) for text in texts if text.strip()
    ]


def _rank(text):
    # Another hash than the one that divides the sides, or the cap would keep documents of one side first.
    return hashlib.blake2b(text.encode()).digest()


def _texts(kind, text, module):
    """The documents of a topic, or of the source of a `module`."""
    if module is None:
        return [text]
    sources = [text] if kind != "docstrings" else []
    return sources + (["\n\n".join(_docstrings(ast.parse(text), module))] if kind != "sources" else [])


def _topics():
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return []
    return [topics[name] for name in sorted(topics)]


def _modules():
    """Sources of the standard library in the order of their paths."""
    library = Path(sysconfig.get_path("stdlib"))
    modules = []
    for folder, folders, files in os.walk(library):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS and not _generated(name)]
        modules += [Path(folder, name) for name in files if name.endswith(".py") and not _generated(name)]
    return sorted(path for path in modules if path.relative_to(library).as_posix() not in _SKIPPED_FILES)


def _generated(name):
    return name.startswith(_SKIPPED_PREFIXES)


def _module_name(path):
    return path.parent.name if path.stem == "__init__" else path.stem


def _docstrings(node, name):
    """Yields "name(arguments)" and docstring of `node` and of every class and function in it, as help() would."""
    if text := ast.get_docstring(node):
        yield f"{name}{_signature(node)}\n\n{text}"
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")


def _signature(node):
    return f"({ast.unparse(node.args)})" if hasattr(node, "args") else ""
