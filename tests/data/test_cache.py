"""A cached folder is whole or absent, however many processes make it."""

import errno
import threading

import numpy as np
import pytest

from efficientllm import data
from efficientllm.data import cache
from efficientllm.data.corpus import Corpus
from efficientllm.errors import UserError


def test_two_at_once_leave_one_whole_entry(tmp_path):
    barrier, found = threading.Barrier(2, timeout=20), []

    def fill(folder):
        (folder / "first").write_text("one")
        barrier.wait()  # both are half way
        (folder / "second").write_text("two")

    def work():
        found.append(cache.entry(tmp_path, "thing", fill))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "thing"] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]
    assert sorted(path.name for path in found[0].iterdir()) == ["checksums.json", "first", "second"]


def test_a_broken_fill_leaves_nothing(tmp_path):
    def fill(folder):
        (folder / "half").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        cache.entry(tmp_path, "thing", fill)
    assert list(tmp_path.iterdir()) == []


def test_an_entry_is_made_once(tmp_path):
    calls = []
    for _ in range(2):
        cache.entry(tmp_path, "thing", calls.append)
    assert len(calls) == 1


def test_a_cache_that_cannot_be_written_says_what_to_set(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written .* set EFFICIENTLLM_CACHE"):
        cache.entry(tmp_path / "file" / "cache", "thing", lambda folder: None)

    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        cache.entry(tmp_path, "thing", full)


def test_the_place_is_the_argument_then_the_variable_then_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("EFFICIENTLLM_CACHE", "~/there")
    assert cache.root("/here").as_posix() == "/here"
    assert cache.root() == tmp_path / "there"
    monkeypatch.delenv("EFFICIENTLLM_CACHE")
    assert cache.root() == tmp_path / ".cache" / "efficientllm"


def test_a_second_start_reads_no_text_until_a_file_changes(spec, tmp_path, monkeypatch):
    from efficientllm.data.files import JsonLines

    reads = []
    real = JsonLines.documents
    monkeypatch.setattr(JsonLines, "documents", lambda self: reads.append(1) or real(self))
    tokenizer = data.build_tokenizer("bytes", spec)
    first = data.describe(spec, tokenizer)
    reads.clear()
    assert data.describe(spec, tokenizer) == first and not reads
    with open(tmp_path / "corpus.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    assert data.describe(spec, tokenizer)["fingerprint"] != first["fingerprint"] and reads


def test_tokens_are_memory_mapped_and_small(spec):
    documents = Corpus(spec).documents(data.build_tokenizer("bytes", spec))["train"]
    assert isinstance(documents.ids, np.memmap) and documents.ids.dtype == np.uint16
    assert documents.ids[-1] == 256 and len(documents.ids) == documents.ends[-1]
