"""Unfinished runs: running, stopped or interrupted."""

import json
import os
import time

import pytest

from efficientllm.record import lock
from efficientllm.report.unfinished import list_unfinished


def state(folder, age=0.0, log="step 3/9\n", owned_by=None):
    (folder / "log.txt").write_text(log)
    if owned_by is not None:
        (folder / lock.FILE).write_text(owned_by)
    for file in folder.iterdir():
        os.utime(file, (time.time() - age,) * 2)
    (unfinished,) = list_unfinished([folder])
    return unfinished


LIVING = json.dumps(lock.identity())
DEAD = json.dumps(lock.identity() | {"pid": 2**22 + 1})
ELSEWHERE = json.dumps({"pid": 1, "host": "another", "boot": "another", "started": 1})


@pytest.mark.parametrize(
    ("age", "owned_by", "expected"),
    [
        (0, None, "running"),
        (86400, None, "stopped"),
        (86400, LIVING, "running"),
        (0, DEAD, "stopped"),
        (0, ELSEWHERE, "running"),
        (86400, ELSEWHERE, "stopped"),
        (0, "", "running"),
        (86400, "[]", "stopped"),
    ],
    ids=["new", "old", "living", "dead", "elsewhere, new", "elsewhere, old", "empty owner", "no owner"],
)
def test_a_run_goes_on_while_its_owner_lives_or_else_while_it_writes(tmp_path, age, owned_by, expected):
    assert state(tmp_path, age, owned_by=owned_by)["state"] == expected


def test_a_run_that_was_interrupted_says_so_itself(tmp_path):
    unfinished = state(tmp_path, log="step 3/9\nSIGINT at step 3: saved in x; the same command resumes\n")
    assert unfinished["state"] == "stopped" and unfinished["said"].startswith("SIGINT at step 3")


def test_an_empty_folder_is_stopped(tmp_path):
    (unfinished,) = list_unfinished([tmp_path])
    assert unfinished["state"] == "stopped" and unfinished["said"].startswith("nothing is logged yet")
