"""The full tier's script goes on after an interruption and writes the table of CONTRIBUTING.md."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

import full
import runs

FIRST = """
import pathlib
import pytest
def test_a(): pathlib.Path("a.log").open("a").write("once ")
def test_b(): assert False
@pytest.mark.slow
def test_c(): pytest.skip("not here")
"""
SECOND = """
import pathlib, time
def test_d():
    if not pathlib.Path("go").exists():
        pathlib.Path("waiting").touch()
        time.sleep(300)
"""
INI = '[tool.pytest.ini_options]\naddopts = "-m \'not slow\'"\nmarkers = ["slow"]\n'
HEADER = f"| {full.COLUMNS} |\n|{'---|' * 9}\n"


@pytest.fixture
def repository(tmp_path):
    """A repository of two files of tests and a guide, with everything committed."""
    (tmp_path / "tests").mkdir()
    shutil.copy(full.__file__, tmp_path / "tests")
    files = {"tests/test_1.py": FIRST, "tests/test_2.py": SECOND, "pyproject.toml": INI, "CONTRIBUTING.md": HEADER}
    files[".gitignore"] = "*.log\ngo\nwaiting\n__pycache__\n.pytest_cache\n"
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "all"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    return tmp_path


def start(repository, *arguments):
    environment = os.environ | {"EFFICIENTLLM_CACHE": str(repository.parent / "cache"), "PYTHONPATH": str(runs.ROOT)}
    command = [sys.executable, "tests/full.py", "-n", "0", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=repository, env=environment, **pipes)


@pytest.mark.slow  # it starts one Python after another
def test_it_goes_on_after_an_interruption_and_writes_the_table(repository):
    stopped = start(repository)
    end = time.monotonic() + 120
    while not (repository / "waiting").exists():
        assert stopped.poll() is None and time.monotonic() < end, stopped.communicate()[0]
        time.sleep(0.05)
    stopped.send_signal(signal.SIGINT)
    output, _ = stopped.communicate(timeout=60)
    assert stopped.returncode == 130 and "the same command goes on" in output, output
    assert "[1/2] 1 passed, 1 failed, 1 skipped" in output and (repository / "CONTRIBUTING.md").read_text() == HEADER

    (repository / "go").touch()
    ended = start(repository)
    output, _ = ended.communicate(timeout=120)
    assert ended.returncode == 1 and "tests.test_1: test_b\n1 failed of 3" in output, output
    assert (repository / "a.log").read_text() == "once ", "the first part ran again"
    guide = (repository / "CONTRIBUTING.md").read_text()
    assert guide.startswith(HEADER) and guide.count("\n") == 3
    assert re.search(r"^\| \d{4}-\d\d-\d\d \| [0-9a-f]{10} \| 3\.\d+\.\S+ \| .* \| 2 \| 1 \| 1 \| \d+ \|$", guide, re.M)


def test_a_part_writes_no_table_and_changes_must_be_committed(repository):
    (repository / "go").touch()
    partial_run = start(repository, "tests/test_2.py")
    output, _ = partial_run.communicate(timeout=120)
    assert (
        partial_run.returncode == 0
        and "0 failed of 1" in output
        and (repository / "CONTRIBUTING.md").read_text() == HEADER
    )
    (repository / "pyproject.toml").write_text("")
    refused = start(repository)
    assert "commit them" in refused.communicate(timeout=60)[0] and refused.returncode == 2


def test_a_folder_is_a_part():
    parts = full.test_parts(["tests"])
    assert parts["tests/test_model.py"] == ["tests/test_model.py"]
    assert "tests/convert/test_command.py" in parts["tests/convert"]
    assert all(file.startswith("tests/convert/peft/") for file in parts["tests/convert/peft"])


def test_the_guide_has_the_table():
    assert len(full.TABLE.findall(full.GUIDE.read_text())) == 1
