import json
import os
import pathlib

import jax.numpy as jnp
import pytest

from efficientllm.errors import UserError
from efficientllm.metrics.reading import Reading
from efficientllm.record.row import build_record, format_table, read_record, write_record
from efficientllm.record.study_metrics import UNITS, paper_metrics
from record.test_study_metrics import AVERAGES, ENERGY, VOID, pretraining

pytestmark = pytest.mark.quick


def build(energy=ENERGY, **changes):
    fields = {
        "outcome": "ok",
        "name": "test",
        "task": "pretrain",
        "config": {"seed": 0},
        "provenance": {},
        "paper_readings": paper_metrics(pretraining(), AVERAGES, energy),
        "physical": {"tokens_per_s": Reading(500.0, "1/s", "wall clock")},
    }
    return build_record(**{**fields, **changes})


def test_every_number_has_a_unit_and_a_source_and_every_null_a_reason():
    record = build()
    assert record["schema_version"] == 1
    assert set(record["paper"]) == set(UNITS)
    for group in ("paper", "physical", "quality"):
        for key, value in record[group].items():
            source = record["sources"][key]
            assert source["unit"] and source["source"]
            assert (value is None) == (source["reason"] is not None)
    assert record["physical"]["tokens_per_s"] == 500.0
    assert record["physical"]["hfu"] is None


def test_failed_runs_have_the_same_columns():
    record = build(outcome="oom", paper_readings=None, physical=None)
    assert set(record["sources"]) == set(build()["sources"])
    assert record["sources"]["al_s"]["reason"] == "the run ended as oom"


def test_unknown_outcomes_and_doubled_keys_are_refused():
    with pytest.raises(ValueError, match="fine"):
        build(outcome="fine")
    with pytest.raises(ValueError, match="two groups.*loss"):
        build(physical={"loss": Reading(1.0, "nat", "training")})


def test_a_row_is_read_back_as_written(tmp_path):
    record = build(physical={"params_total": Reading(jnp.int32(7), "1", "shapes")})
    path = tmp_path / "record.json"
    write_record(record, path)
    assert read_record(path) == record
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_a_write_that_fails_leaves_the_old_row_whole(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_record(build(), path)
    before = path.read_text()
    with pytest.raises(TypeError):
        write_record(build(config={"array": object()}), path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr(pathlib.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed here")))
        write_record(build(name="new"), path)
    assert path.read_text() == before
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_record(build(name="new"), path)
    assert path.read_text() == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 2}'])
def test_what_is_no_row_of_this_schema_is_one_clear_line(tmp_path, text):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"record\.json") as caught:
        read_record(path)
    assert "\n" not in str(caught.value)


def test_the_table_shows_units_sources_and_reasons_within_100_columns():
    table = format_table(build(energy=VOID))
    lines = table.splitlines()
    assert max(map(len, lines)) <= 100
    power = next(line for line in lines if line.startswith("AEC"))
    assert "null" in power and "W" in power and "reset" in power
    assert "42" in next(line for line in lines if line.startswith("AMU"))
    assert any(line.startswith("TT") for line in lines) and not any(line.startswith(("ST", "IT")) for line in lines)
    json.dumps(table)


def test_long_reasons_wrap_under_their_column():
    record = build()
    record["sources"]["mcr"]["reason"] = "a reason " * 20
    lines = format_table(record).splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) > 10


def test_the_table_fits_the_terminal_and_of_serving_holds_latencies_and_bytes(monkeypatch):
    record = build() | {"task": "infer"}
    record["physical"] |= {"ttft_s": 0.25, "tpot_s": 0.0123, "resident_weight_bytes": 88_400_000}
    for key in ("ttft_s", "tpot_s", "resident_weight_bytes"):
        record["sources"][key] = {"source": "a long story of where it comes from", "reason": None, "unit": "s"}
    for columns, widest in ((90, 90), (20, 80), (300, 100)):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = format_table(record).splitlines()
        assert max(map(len, lines)) == widest
    told = {line.split()[0]: line.split() for line in lines if line}
    assert "250" in told["TTFT"] and "ms" in told["TTFT"] and "12.3" in told["TPOT"]
    assert told["weights"][1:3] == ["88.4", "MB"] and told["state"][4] == "null"
