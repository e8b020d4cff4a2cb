"""Rows, variants and blocks read from files."""

import json

import pytest

from efficientllm.errors import UserError
from efficientllm.report import find_rows, rows
from report import made

pytestmark = pytest.mark.quick


def read(*paths):
    return rows.read_rows(find_rows.find_files(paths)[0])


def test_rows_are_found_as_file_folder_and_tree_once(tmp_path):
    file = made.row(tmp_path / "runs" / "a", "gqa", al_s=0.5)
    made.row(tmp_path / "runs" / "b", "mla", al_s=0.6)
    killed = tmp_path / "runs" / "killed"
    killed.mkdir()
    (killed / "config.json").write_text("{}")
    files, orphans = find_rows.find_files([file, file.parent, tmp_path])
    assert len(files) == 2 and orphans == [killed]


def test_variants_are_what_the_configs_differ_in_and_blocks_the_seeds(tmp_path):
    for seed in (0, 1):
        for mixer in ("gqa", "mla"):
            made.row(tmp_path / f"{mixer}{seed}", mixer, seed=seed, al_s=0.5)
    made.row(tmp_path / "again", "mla", seed=1, al_s=0.5, changes={"checkpoint.every": 7})
    rows_read = read(tmp_path)
    assert {row.variant for row in rows_read} == {"model.mixer=gqa", "model.mixer=mla"}
    blocks = sorted(row.block for row in rows_read if row.variant == "model.mixer=mla")
    assert blocks == ["seed 0", "seed 1", "seed 1, repeat 2"]


def test_a_single_variant_has_the_configs_name_and_long_labels_too(tmp_path):
    made.row(tmp_path / "a" / "a", "gqa", seed=0, al_s=0.5)
    made.row(tmp_path / "a" / "b", "gqa", seed=1, al_s=0.5)
    assert {row.variant for row in read(tmp_path / "a")} == {"attention-gqa"}
    changes = {"model.size": "tiny(num_layers=8, dim=256, num_heads=4)"}
    made.row(tmp_path / "a" / "c", "mla(kv_rank=16, rope_dim=8)", seed=1, changes=changes, al_s=0.5)
    assert "attention-mla(kv_rank=16, rope_dim=8)" in {row.variant for row in read(tmp_path / "a")}


def test_a_sweeps_own_words_are_taken(tmp_path):
    rows_read = read(made.sweep(tmp_path, blocks=2))
    assert {(row.variant, row.baseline) for row in rows_read} == {("gqa", "gqa"), ("mqa", "gqa"), ("mla", "gqa")}
    assert sorted({row.block for row in rows_read}) == ["attention 0", "attention 1"]


def test_two_configs_of_one_sweep_variant_are_told_apart(tmp_path):
    told = {"name": "attention", "variant": "mla", "baseline": "gqa", "block": 0, "order": 0, "seed": 0}
    made.row(tmp_path / "a", "mla", sweep=told, al_s=0.5)
    made.row(tmp_path / "b", "mla", sweep=told, changes={"model.size": "small"}, al_s=0.5)
    assert len({row.variant for row in read(tmp_path)}) == 2


def test_null_has_its_reason_and_nan_is_null(tmp_path):
    file = made.row(tmp_path, al_s=0.5)
    record = json.loads(file.read_text())
    record["paper"]["pcu"] = float("nan")
    file.write_text(json.dumps(record))
    (row,) = read(file)
    assert row.values["aec_w"] is None and row.reasons["aec_w"] == "not measured in this run"
    assert row.values["pcu"] is None and row.values["al_s"] == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no readable row"),
        ('{"schema_version": 99}', "schema_version is 99"),
        ('{"schema_version": 1, "paper": []}', "'paper'"),
        ("[1]", "schema_version is None"),
    ],
)
def test_a_file_that_is_no_row_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(UserError, match=message) as refusal:
        read(tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_metric_that_is_no_number_is_refused(tmp_path):
    file = made.row(tmp_path, al_s=0.5)
    file.write_text(file.read_text().replace('"al_s": 0.5', '"al_s": "fast"'))
    with pytest.raises(UserError, match="al_s is 'fast'"):
        read(file)


def test_a_missing_path_and_an_empty_folder_are_refused(tmp_path):
    for path, message in ((tmp_path / "no", "no such file"), (tmp_path, "no record.json")):
        with pytest.raises(UserError, match=message):
            find_rows.find_files([path])


def test_the_tail_of_a_failed_rows_log(tmp_path):
    file = made.row(tmp_path, outcome="oom")
    (tmp_path / "log.txt").write_text("\n".join(f"line {i}" for i in range(100)))
    (row,) = read(file)
    assert row.tail().splitlines()[-1] == "line 99" and len(row.tail().splitlines()) < 20
