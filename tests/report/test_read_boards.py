"""Leaderboards of reports and of rows, read alike."""

import json

import pytest

from efficientllm.errors import UserError
from efficientllm.record import rows_file
from efficientllm.report import __main__ as report
from efficientllm.report.read_boards import read_boards
from report import made


@pytest.fixture
def folders(tmp_path):
    """`(rows, the report of them)`."""
    rows = made.sweep(tmp_path / "rows", blocks=2)
    assert report.main([str(rows), f"--out={tmp_path / 'report'}"]) == 0
    return rows, tmp_path / "report"


def test_a_report_and_its_rows_are_one_board(folders):
    rows, written = folders
    (of_rows,), (of_report,) = read_boards([rows]), read_boards([written])
    assert of_rows.content["groups"] == [
        group | {"variants": made_lists(group["variants"])} for group in of_report.content["groups"]
    ]
    changed = {variant["variant"]: variant["config"] for variant in of_report.content["groups"][0]["variants"]}
    assert changed["mla"]["model.mixer"] == "mla" and "model.mixer" not in changed["gqa"]
    assert not any(key.startswith(("name", "seed", "sweep")) for config in changed.values() for key in config)


def made_lists(variants):
    return json.loads(json.dumps(variants))


def test_rows_are_preferred_to_reports_beside_them(folders, tmp_path):
    rows, written = folders
    (board,) = read_boards([tmp_path])
    assert board.folder == tmp_path and len(board.content["groups"]) == 1
    for file in rows.rglob("record.json"):
        file.unlink()
    assert [board.folder for board in read_boards([tmp_path])] == [written]


def test_rows_in_one_file_are_a_board(folders, tmp_path):
    rows, _ = folders
    (tmp_path / "packed").mkdir()
    rows_file.pack_rows(rows, tmp_path / "packed" / "made.rows.jsonl")
    (packed,), (of_rows,) = read_boards([tmp_path / "packed"]), read_boards([rows])
    cells, expected = (board.content["groups"][0]["variants"][1]["cells"] for board in (packed, of_rows))
    assert cells == expected


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema_version": 2}, "schema_version is 2"),
        ({"groups": None}, "groups = None"),
        ({"groups": [{"sweep": 1}]}, "sweep = 1"),
    ],
)
def test_a_damaged_board_is_refused(folders, change, says):
    _, written = folders
    file = written / "leaderboard.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=says):
        read_boards([written])


def test_a_cell_that_is_no_number_is_refused(folders):
    _, written = folders
    file = written / "leaderboard.json"
    content = json.loads(file.read_text())
    content["groups"][0]["variants"][0]["cells"]["al_s"]["mean"] = "fast"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="mean = 'fast'"):
        read_boards([written])


def test_a_folder_without_either_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_boards([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no record.json in it"):
        read_boards([tmp_path / "empty"])
