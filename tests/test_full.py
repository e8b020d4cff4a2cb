"""The full tier's script goes on after an interruption and writes the table of CONTRIBUTING.md."""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version

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
    assert json.loads((repository / "tests/full_results.json").read_text())["parts"].keys() == {
        "tests/test_1.py",
        "tests/test_2.py",
    }
    assert re.search(r"^\| \d{4}-\d\d-\d\d \| [0-9a-f]{10} \| 3\.\d+\.\S+ \| .* \| 2 \| 1 \| 1 \| \d+ \|$", guide, re.M)


def test_a_part_is_run_again_and_changes_must_be_committed(repository):
    (repository / "go").touch()
    for _ in range(2):  # by its path a part is run whether or not it has a result
        run = start(repository, "tests/test_2.py")
        output, _ = run.communicate(timeout=120)
        assert run.returncode == 0 and "1 passed" in output and "0 failed of 1" in output
        assert (repository / "CONTRIBUTING.md").read_text() == HEADER
    (repository / "pyproject.toml").write_text("")
    refused = start(repository)
    assert "commit them" in refused.communicate(timeout=60)[0] and refused.returncode == 2


def result(**fields):
    values = {
        "date": "2026-01-02T10:00:00",
        "commit": "a" * 10,
        "python": "3.11.7",
        "jax": "1",
        "cpu": "2 × A",
        "seconds": 90,
    }
    return full.Result(**values | {"passed": 3, "failed": 0, "skipped": 1, "failures": []} | fields)


def test_a_row_of_several_commits_and_machines():
    rows = [result(), result(date="2026-01-03T09:00:00", commit="b" * 10, cpu="2 × B", failed=1)]
    assert full.table_row(rows) == (
        "| 2026-01-02 to 2026-01-03 | aaaaaaaaaa to bbbbbbbbbb | 3.11.7 | 1 | 2 × A; 2 × B | 6 | 1 | 2 | 3 |"
    )
    assert full.table_row(rows[:1]) == "| 2026-01-02 | aaaaaaaaaa | 3.11.7 | 1 | 2 × A | 3 | 0 | 1 | 2 |"


def test_what_is_due(tmp_path):
    """A run ends when every part has a result of it, under this Python and JAX."""
    file, here = tmp_path / "results.json", {"python": platform.python_version(), "jax": version("jax")}
    first = full.Progress(file)
    assert first.due(["a", "b"]) == ["a", "b"]
    first.add("a", result(**here))
    again = full.Progress(file)
    assert again.due(["a", "b"]) == ["b"] and again.seconds_left(["a", "b"]) == 90
    again.add("b", result(python="3.9.0", jax="1"))
    assert again.due(["a", "b"]) == ["b"]
    again.add("b", result(**here))
    assert again.due(["a", "b"]) == [] and full.Progress(file).due(["a", "b", "c"]) == ["c"]


def test_a_folder_is_a_part():
    parts = full.test_parts(["tests"])
    assert parts["tests/test_model.py"] == ["tests/test_model.py"]
    assert "tests/convert/test_command.py" in parts["tests/convert"]
    assert all(file.startswith("tests/convert/peft/") for file in parts["tests/convert/peft"])


def test_the_guide_has_the_table():
    assert len(full.TABLE.findall(full.GUIDE.read_text())) == 1
