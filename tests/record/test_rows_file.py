"""Rows files: what they keep of a row, how they merge, and that wrong ones are refused with one line."""

import gzip
import json

import pytest

from efficientllm.errors import UserError
from efficientllm.record import rows_file
from efficientllm.record.row import read_record
from efficientllm.report import find_rows, grid_searches, leaderboard, rows
from report import made

pytestmark = pytest.mark.quick


def facts(row):
    """All that a report knows of a row but its path."""
    known = {key: value for key, value in vars(row).items() if key not in ("path", "record")}
    sources = {key: (row.source(key), row.unit(key), row.group(key)) for key in row.values}
    return known | {"sources": sources, "notes": row.notes(), "run": find_rows.run_of(row), "sweep": row.sweep}


@pytest.mark.parametrize("ending", rows_file.ENDINGS)
def test_a_report_of_the_file_is_that_of_the_folders(tmp_path, ending):
    out, file = made.sweep(tmp_path / "out", blocks=2, conditions=None), tmp_path / "committed" / f"a{ending}"
    count = len(list(out.glob("*/record.json")))
    assert rows_file.pack_rows(out, file) == count
    from_folders = find_rows.collect_rows([out]).rows
    for path in (file, file.parent):
        from_file = find_rows.collect_rows([path]).rows
        assert list(map(facts, from_file)) == list(map(facts, from_folders))
        assert [row.path for row in from_file] == [file / row.path.relative_to(out) for row in from_folders]
    boards = [leaderboard.build_leaderboard(collected) for collected in (from_file, from_folders)]
    assert json.dumps(boards[0]).replace(str(file), str(out)) == json.dumps(boards[1])
    # Both at once are the same runs, and packing what was restored changes nothing.
    assert len(find_rows.collect_rows([out, file]).rows) == count
    before = file.read_bytes()
    assert rows_file.restore_rows(file, tmp_path / "fresh") == count
    assert rows_file.restore_rows(file, tmp_path / "fresh") == 0
    assert rows_file.pack_rows(tmp_path / "fresh", file) == count and file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file], "nothing temporary is left"


def test_a_packed_row_is_smaller_and_loses_no_number(tmp_path):
    path = made.row(tmp_path / "out" / "a", al_s=0.5, eval_loss=2.0)
    record = read_record(path)
    rows_file.pack_rows(tmp_path / "out", tmp_path / "a.rows.jsonl")
    (kept,) = rows_file.read_rows_file(tmp_path / "a.rows.jsonl").values()
    same = ("paper", "physical", "quality", "conditions", "config", "provenance", "outcome", "name", "task")
    assert all(kept[key] == record[key] for key in same)
    assert (tmp_path / "a.rows.jsonl").stat().st_size < 0.75 * path.stat().st_size
    long = record | {"warm_up": {"discarded_s": [0.123456, None], "settled": False}}
    assert rows_file.trim_record(long)["warm_up"] == {"discarded_s": [0.123, None], "settled": False}
    assert rows_file.trim_record(rows_file.trim_record(long)) == rows_file.trim_record(long)


def test_merging_keeps_each_run_once_and_the_better_row_of_a_folder(tmp_path):
    file = tmp_path / "a.rows.jsonl"
    for folder, outcome, run in (("x", "ok", "1"), ("y", "crash", "2"), ("z", "nan", "3")):
        made.row(tmp_path / "one" / folder, outcome=outcome, told={"run": run}, al_s=0.5)
    assert rows_file.pack_rows(tmp_path / "one", file) == 3
    for folder, outcome, run in (("x", "crash", "4"), ("y", "ok", "5"), ("z", "oom", "6"), ("copy", "ok", "1")):
        made.row(tmp_path / "two" / folder, outcome=outcome, told={"run": run}, al_s=0.5)
    assert rows_file.pack_rows(tmp_path / "two", file) == 3
    runs = {folder: record["provenance"]["run"] for folder, record in rows_file.read_rows_file(file).items()}
    assert runs == {"copy": "1", "y": "5", "z": "6"}, "a success outlives a failure, else the newest; no run twice"


def test_trials_of_a_grid_are_told_from_rows(tmp_path):
    told = {"name": "s", "variant": "gqa", "baseline": "gqa", "block": 0, "order": 0, "seed": 0}
    made.row(tmp_path / "out" / "00", sweep=told, eval_loss=2.0, told={"run": "0"})
    for place, (value, outcome, loss) in enumerate((("1e-3", "ok", 2.5), ("3e-3", "ok", 2.0), ("1", "nan", None))):
        trial = told | {"grid": f"--config.train.schedule=constant(peak={value})"}
        ended = {"run": value, "ended": f"2026-01-01T00:00:{place + 5:02}"}
        folder = tmp_path / "out" / "grid" / f"{place:02}"
        made.row(folder, outcome=outcome, sweep=trial, eval_loss=loss, told=ended)
    file = tmp_path / "s.rows.jsonl"
    assert rows_file.pack_rows(tmp_path / "out", file) == 4
    collected = find_rows.collect_rows([file])
    assert [row.path.parent.name for row in collected.rows] == ["00"]
    assert collected.left_out == [f"left out: {file}/grid: 3 tries of the grid of sweep s"]
    (grid,) = grid_searches.read_grids([tmp_path / "s.rows.jsonl"])
    assert grid["sweep"] == "s" and grid["key"] == "train.schedule"
    (tries,) = grid["variants"].values()
    assert tries["chosen"] == "constant(peak=3e-3)" and [trial["seconds"] for trial in tries["tries"]] == [5, 6, 7]
    assert [trial["eval_loss"] for trial in tries["tries"]] == [2.5, 2.0, None]


def lines_that_are_wrong(line):
    record = json.loads(line)
    return {
        "no readable row": line[: len(line) // 2],
        "schema_version is 7": json.dumps(record | {"schema_version": 7}),
        "holds 3": "3",
        "'folder' is None": json.dumps({key: value for key, value in record.items() if key != "folder"}),
        "'folder' is '../a'": json.dumps(record | {"folder": "../a"}),
        "'folder' is '/etc'": json.dumps(record | {"folder": "/etc"}),
        "'folder' is 'a/..'": json.dumps(record | {"folder": "a/.."}),
        "'folder' is 'a//b'": json.dumps(record | {"folder": "a//b"}),
        "'folder' is '.'": json.dumps(record | {"folder": "."}),
        "'folder' is 'a\\x00'": json.dumps(record | {"folder": "a\0"}),
        "outcome = 3": json.dumps(record | {"outcome": 3}),
        "provenance = None": json.dumps(record | {"provenance": None}),
    }


def test_a_wrong_line_is_named_and_costs_no_other_row(tmp_path):
    file = tmp_path / "a.rows.jsonl"
    made.row(tmp_path / "out" / "a", al_s=0.5)
    rows_file.pack_rows(tmp_path / "out", file)
    line = file.read_text()
    wrong = lines_that_are_wrong(line.strip())
    for message, text in wrong.items():
        (tmp_path / "wrong.rows.jsonl").write_text(f"{text}\n")
        with pytest.raises(UserError) as error:
            rows_file.restore_rows(tmp_path / "wrong.rows.jsonl", tmp_path / "fresh")
        assert message in str(error.value) and "wrong.rows.jsonl, line 1" in str(error.value)
        assert "\n" not in str(error.value) and not (tmp_path / "fresh").exists()
    file.write_text(
        "\n".join([line.strip(), "", *wrong.values(), json.dumps(json.loads(line) | {"quality": {"loss": "x"}})])
    )
    collected = find_rows.collect_rows([tmp_path / "a.rows.jsonl"])
    assert len(collected.rows) == 1 and len(collected.left_out) == len(wrong) + 1
    assert all(f"left out: {file}, line " in left_out for left_out in collected.left_out)


def test_a_file_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "a.rows.jsonl.gz"
    packed = gzip.compress(b"x" * 1000)
    monkeypatch.setattr(rows_file, "MOST", 900)
    contents = {"is not a whole gzip file": gzip.compress(b"x")[:-9], "not a gzip": b"plain"}
    contents["is not UTF-8"] = gzip.compress(b"\xff")
    for message, content in (contents | {"more than 900 bytes unpacked": packed}).items():
        file.write_bytes(content)
        with pytest.raises(UserError, match=message.replace("not a gzip", "is not a whole gzip file")):
            rows_file.read_rows_file(file)
        with pytest.raises(UserError, match=r"a\.rows\.jsonl\.gz"):
            find_rows.collect_rows([file])
    with pytest.raises(UserError, match="rows.jsonl or .rows.jsonl.gz"):
        rows_file.check_name("--rows", "rows.json")
    made.row(tmp_path / "run", al_s=0.5)
    with pytest.raises(UserError, match="is a run's folder; give the folder that holds it"):
        rows_file.pack_rows(tmp_path / "run", tmp_path / "b.rows.jsonl")
    assert rows.read_row(tmp_path / "run" / "record.json").values["al_s"] == 0.5
