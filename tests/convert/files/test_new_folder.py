"""Folders written atomically: whole or absent, also after a killed process."""

import os
import signal
import subprocess
import sys

import pytest

from efficientllm.convert.files.new_folder import OWNER, new_folder
from efficientllm.errors import UserError

KILLED = """
import os, pathlib, sys, time
from efficientllm.convert.files.new_folder import new_folder
with new_folder(sys.argv[1]) as new:
    (new / "weights").write_bytes(bytes(1000))
    print("written", flush=True)
    time.sleep(600)
"""


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path / "out"], stdout=subprocess.PIPE)
    with process:
        assert process.stdout.readline() == b"written\n"
        with new_folder(tmp_path / "out") as new:  # the other still writes
            (new / "weights").write_bytes(b"ours")
            assert len(hidden(tmp_path)) == 2
        process.send_signal(signal.SIGKILL)
    assert hidden(tmp_path) == [f".out-{process.pid}"]
    others = tmp_path / ".out-1"
    others.mkdir()
    (others / "precious").touch()
    (tmp_path / ".out-x").mkdir()
    (tmp_path / "out" / "weights").unlink()
    with new_folder(tmp_path / "out") as new:
        (new / "weights").write_bytes(b"again")
    assert sorted(hidden(tmp_path)) == [".out-1", ".out-x"] and (others / "precious").exists()
    assert os.listdir(tmp_path / "out") == ["weights"]


def test_nothing_is_left_of_one_that_failed(tmp_path):
    with pytest.raises(KeyError), new_folder(tmp_path / "out") as new:
        (new / "weights").touch()
        assert (new / OWNER).exists()
        raise KeyError("x")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["file/out", "x" * 300, "a\0b", "full"])
def test_one_that_cannot_be_written_is_one_line(name, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    with pytest.raises(UserError, match="cannot be written|holds something already"), new_folder(f"{tmp_path}/{name}"):
        pass
