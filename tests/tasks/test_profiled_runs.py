"""Runs with `config.profile.steps`: the trace, its table, the row, and what is left out of the measured steps."""

import gzip
import json
import os

import pytest

import runs
from efficientllm import main

pytestmark = [pytest.mark.quick, pytest.mark.xdist_group("runs")]
SIZE = "tiny(num_layers=1, dim=256, num_heads=2, num_kv_heads=1, head_dim=32, hidden=1024)"
ARGUMENTS = {"model__size": SIZE, "train__steps": 8, "train__length": 64, "sample__tokens": 0, "eval__every": 0}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return runs.corpus(tmp_path_factory.mktemp("data") / "texts")


def row(workdir):
    return json.loads((workdir / "record.json").read_text())


def test_a_trace_a_table_and_a_row_without_the_traced_steps(texts, tmp_path):
    status, output = runs.finish(runs.start(runs.arguments(texts, tmp_path / "run", **ARGUMENTS, profile__steps="3:6")))
    assert status == 0, output
    record = row(tmp_path / "run")
    profile = record["profile"]
    folder = tmp_path / "run" / profile["trace"]
    assert [file.suffixes for file in folder.glob("*.xplane.pb")] == [[".xplane", ".pb"]]
    events = json.loads(gzip.decompress((folder / "perfetto_trace.json.gz").read_bytes()))["traceEvents"]
    assert any("fusion" in event.get("name", "") for event in events)
    operations = {operation["kind"]: operation for operation in profile["operations"]}
    busy_s = sum(operation["seconds"] for operation in operations.values())
    assert 0 < busy_s <= profile["step_s"] <= profile["step_s"] * os.cpu_count()
    seconds = [operation["seconds"] for operation in profile["operations"]]
    assert seconds == sorted(seconds, reverse=True) and operations["products"]["seconds"] > 0
    assert {"attention", "loss", "optimizer"} <= operations.keys()
    flops = sum(operation["flops"] for operation in operations.values())
    # Not their share of the time: on a busy machine whatever a thread was stopped in takes longest.
    assert operations["products"]["flops"] > 0.95 * flops
    assert flops == pytest.approx(record["physical"]["program_flops_per_token"] * 8 * 64, rel=0.01)
    assert profile["steps"] == record["warm_up"]["profiled_steps"] == 4
    assert "4 step(s) that were profiled are left out" in output and "of FLOP/s" in output
    assert len(record["warm_up"]["discarded_s"]) == 4  # half of the steps, and none is left to be measured
    assert record["config"]["profile"] == {"steps": "3:6"}


def test_batches_of_several_devices_and_a_pause_within_the_trace(texts, tmp_path):
    argv = runs.arguments(texts, tmp_path / "run", train__steps=6, eval__every=2, profile__steps="2:4")
    assert main.main(argv) == 0
    profile = row(tmp_path / "run")["profile"]
    kinds = {operation["kind"]: operation for operation in profile["operations"]}
    assert kinds["collectives"]["seconds"] > 0
    assert sum(operation["seconds"] for operation in kinds.values()) <= profile["step_s"]


@pytest.mark.parametrize(
    "steps, message",
    [
        ("13:10", "ends before it begins; write '10:13'"),
        ("a", "is no range of steps; write FIRST:LAST, such as '10:13'"),
        ("10", "is no range of steps; write FIRST:LAST, such as '10:13'"),
        ("0:3", "steps count from 1; write '1:3'"),
        ("5:13", "config.train.steps = 8 is its last step; write '5:8'"),
    ],
)
def test_bad_steps_are_one_line(steps, message, tmp_path, capsys):
    argv = runs.arguments(tmp_path, tmp_path / "run", train__steps=8, profile__steps=steps)
    assert main.main(argv) == 2
    assert capsys.readouterr().err == f"efficientllm: config.profile.steps = {steps!r}: {message}\n"
    assert not (tmp_path / "run").exists()


def test_a_request_has_no_steps_to_profile(tmp_path, capsys):
    assert main.main(runs.arguments(tmp_path, tmp_path / "run", task="infer", profile__steps="1:2")) == 2
    assert "has no training steps; leave it out" in capsys.readouterr().err
