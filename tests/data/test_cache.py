"""A cached folder is whole or absent, however many processes make it."""

import errno
import os
import threading
import time

import numpy as np
import pytest

from efficientllm import data
from efficientllm.data import cache
from efficientllm.data.corpus import Corpus
from efficientllm.errors import UserError

pytestmark = pytest.mark.quick


def test_two_at_once_leave_one_whole_entry(tmp_path):
    barrier, entries_read = threading.Barrier(2, timeout=20), []

    def fill(folder):
        (folder / "first").write_text("one")
        barrier.wait()  # both are half way
        (folder / "second").write_text("two")

    def work():
        entries_read.append(cache.entry(tmp_path, "thing", fill))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert entries_read == [tmp_path / "thing"] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]
    assert sorted(path.name for path in entries_read[0].iterdir()) == ["checksums.json", "first", "second"]


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
    with pytest.raises(UserError, match="EFFICIENTLLM_CACHE = .*: cannot be written .* name a folder"):
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
    first = data.describe_data(spec, tokenizer)
    reads.clear()
    assert data.describe_data(spec, tokenizer) == first and not reads
    with open(tmp_path / "corpus.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    assert data.describe_data(spec, tokenizer)["fingerprint"] != first["fingerprint"] and reads


def test_tokens_are_memory_mapped_and_small(spec):
    documents = Corpus(spec).documents(data.build_tokenizer("bytes", spec))["train"]
    assert isinstance(documents.ids, np.memmap) and documents.ids.dtype == np.uint16
    assert documents.ids[-1] == 256 and len(documents.ids) == documents.ends[-1]


def entries(folder, kind):
    (entry,) = folder.glob(f"{kind}-*")
    return entry


DAMAGE = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "a flipped bit": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "nulls": lambda content: bytes(len(content)),
    "absent": None,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "kind, name",
    [
        ("corpus", "summary.json"),
        ("corpus", "checksums.json"),
        ("tokens", "train.npy"),
        ("tokens", "held_out_ends.npy"),
    ],
)
def test_a_damaged_entry_is_made_again_with_a_line(spec, cache_dir, caplog, kind, name, damage):
    tokenizer = data.build_tokenizer("bytes", spec)
    first = data.describe_data(spec, tokenizer)
    path = entries(cache_dir, kind) / name
    content = path.read_bytes()
    path.unlink() if damage == "absent" else path.write_bytes(DAMAGE[damage](content))
    assert data.describe_data(spec, tokenizer) == first and path.read_bytes() == content
    (line,) = [record.getMessage() for record in caplog.records if "is damaged" in record.getMessage()]
    assert str(entries(cache_dir, kind)) in line and "it is made again" in line
    assert data.describe_data(spec, tokenizer) == first and len(caplog.records) == 1
    assert not list(cache_dir.glob(f".{kind}-*"))


def test_what_lies_beside_the_files_of_an_entry_is_damage_too(tmp_path):
    calls = []

    def fill(folder):
        return calls.append(1) or (folder / "a").write_text("a")

    (cache.entry(tmp_path, "thing", fill) / "b").write_text("b")
    assert sorted(path.name for path in cache.entry(tmp_path, "thing", fill).iterdir()) == ["a", "checksums.json"]
    assert len(calls) == 2


def test_an_entry_is_read_once_until_it_is_touched(tmp_path, monkeypatch):
    reads, real = [], cache._checksums
    monkeypatch.setattr(cache, "_checksums", lambda folder: reads.append(1) or real(folder))

    def fill(folder):
        return (folder / "a").write_text("a")

    for _ in range(3):
        cache.entry(tmp_path, "thing", fill)
    assert len(reads) == 2  # when it was written, and when it was first opened


def test_a_damaged_entry_that_cannot_be_replaced_says_what_to_set(tmp_path, monkeypatch):
    def fill(folder):
        return (folder / "a").write_text("a")

    (cache.entry(tmp_path, "thing", fill) / "a").write_text("")

    def closed(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(cache.Path, "rename", closed)
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\); name a folder"):
        cache.entry(tmp_path, "thing", fill)


def test_several_that_find_it_damaged_end_with_one_whole_entry(tmp_path):
    def fill(folder):
        return (folder / "a").write_text("a")

    (cache.entry(tmp_path, "thing", fill) / "a").write_text("")
    entries_read = []
    threads = [
        threading.Thread(target=lambda: entries_read.append(cache.entry(tmp_path, "thing", fill))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(entries_read) == 8 and (tmp_path / "thing" / "a").read_text() == "a"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "thing"]


def test_what_a_killed_process_had_begun_is_removed_later(tmp_path):
    for name, age in ((f".thing-{'0' * 32}", 2 * cache.ABANDONED_S), (f".thing-{'1' * 32}", 0), (".other-0", 1e6)):
        (tmp_path / name).mkdir()
        now = time.time()
        os.utime(tmp_path / name, (now - age, now - age))
    cache.entry(tmp_path, "thing", lambda folder: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other-0", f".thing-{'1' * 32}", "thing"]
