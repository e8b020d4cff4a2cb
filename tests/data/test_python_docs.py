"""The default corpus: what is in it, what is not, and that its two sides share nothing."""

import ast
import sys

import pytest

from efficientllm.data import python_docs
from efficientllm.data.corpus import Corpus
from efficientllm.errors import UserError
from efficientllm.registry import build

pytestmark = pytest.mark.quick

SMALL = "python_docs(max_bytes=1500000, held_out=0.2)"


@pytest.fixture(scope="module")
def documents():
    return list(build("data", SMALL).documents())


def test_topics_sources_and_docstrings_are_there(documents):
    from pydoc_data.topics import topics

    texts = {text for text, _ in documents}
    modules = {group for text, group in documents if group not in topics.values()}
    assert any(topic in texts for topic in topics.values())
    assert len(modules) > 20 and modules <= texts
    assert sum(len(text.encode()) for text in texts) <= 1_500_000


def test_docstrings_stay_on_the_side_of_their_source(documents):
    corpus = Corpus(SMALL)
    held_out, train = (set(corpus.texts(side)) for side in ("held_out", "train"))
    apart = [(text, group) for text, group in documents if text != group]
    assert apart and all((text in held_out) == (group in held_out) for text, group in apart)
    assert held_out and train and not held_out & train


def test_kinds_are_the_parts_of_all_and_keep_their_side():
    from pydoc_data.topics import topics

    kinds = {kind: list(build("data", f"python_docs(kind={kind!r})").documents()) for kind in python_docs.KINDS}
    every = set(kinds["all"])
    assert sum(map(len, kinds.values())) == 2 * len(kinds["all"]) and every == {
        document for kind in ("topics", "sources", "docstrings") for document in kinds[kind]
    }
    assert {text for text, _ in kinds["topics"]} == set(topics.values())
    assert all(text == group for text, group in kinds["sources"])
    assert {group for _, group in kinds["docstrings"]} < {text for text, _ in kinds["sources"]}
    corpora = {kind: Corpus(f"python_docs(kind={kind!r}, held_out=0.9)") for kind in ("all", "docstrings")}
    assert all(corpora["all"].side(group) == corpora["docstrings"].side(group) for _, group in kinds["docstrings"])


def test_the_cap_is_of_the_bytes_of_the_kind():
    for kind in python_docs.KINDS:
        texts = [text for text, _ in build("data", f"python_docs(kind={kind!r}, max_bytes=200000)").documents()]
        assert 50_000 < sum(len(text.encode()) for text in texts) <= 200_000


def test_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match="kind = 'source'.*sources"):
        build("data", "python_docs(kind='source')")


def test_docstrings_read_like_help():
    source = '"""Top."""\nclass A:\n    """Class."""\n'
    source += '    async def f(self, x=1):\n        """Deep."""\n        def g(): "In."\n'
    docstrings = list(python_docs._docstrings(ast.parse(source), "m"))
    assert docstrings == ["m\n\nTop.", "m.A\n\nClass.", "m.A.f(self, x=1)\n\nDeep.", "m.A.f.g()\n\nIn."]


def test_paths_are_sorted_and_hold_no_tests_and_no_tables():
    paths = python_docs._modules()
    assert paths == sorted(paths) and len(paths) > 300
    names = {name for path in paths for name in path.parts[len(sys.prefix.split("/")) :]}
    assert not names & {"test", "tests", "idlelib", "turtledemo", "encodings", "site-packages", "pydoc_data"}
    assert not any(path.name.startswith("_sysconfigdata") for path in paths)


def test_the_cap_keeps_a_subset_in_the_same_order(documents):
    small = list(build("data", "python_docs(max_bytes=300000)").documents())
    positions = [documents.index(document) for document in small]
    assert positions == sorted(positions) and 0 < len(small) < len(documents)


def test_no_module_is_imported():
    before = set(sys.modules)
    python_docs._documents.cache_clear()
    list(build("data", "python_docs(max_bytes=100000)").documents())
    assert set(sys.modules) - before <= {"pydoc_data", "pydoc_data.topics"}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("all", "carries neither pydoc_data nor module sources"),
        ("topics", "carries no pydoc_data"),
        ("docstrings", "carries no module sources"),
    ],
)
def test_a_python_without_its_library_says_so(kind, message, monkeypatch):
    python_docs._documents.cache_clear()
    monkeypatch.setattr(python_docs, "_topics", list)
    monkeypatch.setattr(python_docs, "_modules", list)
    with pytest.raises(ValueError, match=message):
        list(build("data", f"python_docs(kind={kind!r})").documents())
