"""A file is the old one or the new one, whatever stops its writer."""

import os
import pathlib

import pytest

from efficientllm.runtime import atomic_write

pytestmark = pytest.mark.quick


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_made_and_replaced(tmp_path):
    for text in ("first", "sécond, longer"):
        atomic_write.write_atomically(tmp_path / "a.txt", text)
        assert (tmp_path / "a.txt").read_text(encoding="utf-8") == text and names(tmp_path) == ["a.txt"]
    atomic_write.write_atomically(str(tmp_path / "a.txt"), "third")
    assert (tmp_path / "a.txt").read_text() == "third"


@pytest.mark.parametrize("owner, call", [(os, "fsync"), (pathlib.Path, "replace"), (pathlib.Path, "write_text")])
def test_an_error_leaves_the_old_file_and_nothing_beside_it(owner, call, tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("old")

    def full(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(owner, call, full)
        atomic_write.write_atomically(file, "new")
    assert file.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_an_error_of_the_writer_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.bin"
    file.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), atomic_write.replacing(file) as draft:
        draft.write_bytes(b"half of the n")
        assert file.read_bytes() == b"old"
        raise ZeroDivisionError
    assert file.read_bytes() == b"old" and names(tmp_path) == ["a.bin"]
