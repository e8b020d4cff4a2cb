"""Rows in folders: what is left out, and that it is said."""

import csv
import json
import os
import random
import shutil

import pytest

from efficientllm.errors import UserError
from efficientllm.report import __main__ as command
from efficientllm.report import details, find_rows, leaderboard, markdown, statistics, write_files
from report import made
from tiers import slow_case

pytestmark = pytest.mark.quick

HUGE = "9" * 400


def spoil(text):
    """Files that are no row, by what is wrong."""
    record = json.loads(text)

    def changed(**changes):
        return json.dumps(record | changes)

    return {
        "list": "[]",
        "number": "3",
        "half": text[: len(text) // 2],
        "empty": "",
        "deep": "[" * 100_000,
        "version": changed(schema_version=7),
        "huge": text.replace('"al_s": 0.5', f'"al_s": {HUGE}'),
        "word": text.replace('"al_s": 0.5', '"al_s": "NaN"'),
        "sweep": changed(sweep="attention"),
        "seed": changed(config=record["config"] | {"seed": [1]}),
        "surrogate": changed(name="\ud800"),
        "sources": changed(sources={"al_s": "fast"}),
        "devices": changed(provenance={"devices": ["cpu"]}),
        "conditions": changed(conditions={"starved": "yes"}),
        "bytes": "\udcff",
    }


def test_what_is_no_row_is_left_out_with_one_line(tmp_path, capsys):
    text = made.row(tmp_path / "runs" / "good", al_s=0.5).read_text()
    bad = spoil(text)
    for name, content in bad.items():
        folder = tmp_path / "runs" / name
        folder.mkdir()
        (folder / "record.json").write_text(content, errors="surrogateescape" if name == "bytes" else None)
    (tmp_path / "runs" / "loop").mkdir()
    (tmp_path / "runs" / "loop" / "record.json").symlink_to(tmp_path / "runs" / "loop" / "record.json")
    os.mkfifo(tmp_path / "runs" / "record.json")
    (tmp_path / "runs" / "endless").mkdir()
    (tmp_path / "runs" / "endless" / "record.json").symlink_to("/dev/zero")
    (tmp_path / "runs" / "sparse").mkdir()
    with open(tmp_path / "runs" / "sparse" / "record.json", "wb") as file:
        file.truncate(10**12)
    (tmp_path / "runs" / "round").symlink_to(tmp_path / "runs")
    assert command.main([str(tmp_path / "runs"), f"--out={tmp_path / 'report'}"]) == 0
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert len(lines) == len(bad) + 4 and all(line.startswith("left out: ") for line in lines)
    for name in bad:
        assert sum(f"/{name}/record.json" in line for line in lines) == 1, name
    assert "rows 1," in shown.out
    assert "## Left out" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize("name", ["list", "huge", "sweep", "surrogate"])
def test_one_that_was_named_itself_is_refused(tmp_path, name):
    file = made.row(tmp_path, al_s=0.5)
    file.write_text(spoil(file.read_text())[name])
    with pytest.raises(UserError) as refusal:
        find_rows.collect_rows([file])
    assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="no row is left"):
        find_rows.collect_rows([tmp_path])


def test_copies_are_one_run_and_runs_of_one_config_are_not(tmp_path):
    made.row(tmp_path / "a", al_s=0.5)
    made.row(tmp_path / "b", al_s=0.51)
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    made.row(tmp_path / "d", al_s=0.5, told={"run": "d"})
    made.row(tmp_path / "e", al_s=0.52, told={"run": "d"})
    collected = find_rows.collect_rows([tmp_path])
    assert [row.path.parent.name for row in collected.rows] == ["a", "b", "d"]
    assert [line.split(": ")[1].split("/")[-2] for line in collected.left_out] == ["c", "e"]


def test_a_folder_called_grid_is_left_out_for_what_it_holds_only(tmp_path):
    made.row(tmp_path / "grid" / "a", al_s=0.5)
    made.row(tmp_path / "grid" / "grid" / "b", "mqa", al_s=0.5)
    assert len(find_rows.collect_rows([tmp_path]).rows) == 2
    sweep = tmp_path / "sweep"
    made.row(sweep / "00", "mla", al_s=0.5)
    made.row(sweep / "grid" / "01", "mla", al_s=0.6)
    (sweep / "grid.json").write_text(json.dumps({"sweep": "x", "key": "k", "variants": {}}))
    told = {"name": "y", "variant": "mla", "baseline": "mla", "block": 0, "order": 0, "seed": 0, "grid": "--config.k=1"}
    made.row(tmp_path / "moved", "mla", sweep=told, al_s=0.7)
    collected = find_rows.collect_rows([tmp_path])
    assert len(collected.rows) == 3 and len(collected.left_out) == 2
    assert "1 tries" in collected.left_out[0] and "grid of sweep y" in collected.left_out[1]
    assert len(find_rows.collect_rows([tmp_path / "moved"]).rows) == 1, "asked for by itself"


def test_a_cell_is_no_formula_and_a_number_stays_one(tmp_path):
    names = ("=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\t=1", "plain")
    for i, name in enumerate(names):
        told = {"name": name, "variant": name, "baseline": name, "block": 0, "order": i, "seed": i}
        made.row(tmp_path / str(i), sweep=told, told={"run": name}, al_s=0.5, loss=-2.5, **{"=1+1": 1.0})
    collected = find_rows.collect_rows([tmp_path])
    shown = leaderboard.build_leaderboard(collected.rows)
    lines = list(csv.DictReader(write_files.rows_csv(collected.rows, shown["columns"]).splitlines()))
    assert {line["variant"] for line in lines} == {f"'{name}" for name in names[:-1]} | {"plain"}
    assert all(line["loss [nat]"] == "-2.5" and "'=1+1 [nat]" in line for line in lines)


def values(rng):
    """JSON values that a row of ours would not have in most places."""
    return rng.choice(
        [
            None,
            True,
            0,
            -1,
            3,
            10**39,
            1.5,
            1e308,
            -1e308,
            1e-320,
            "",
            "x",
            "=1",
            "NaN",
            "\n",
            [],
            [1],
            {},
            {"a": 1},
            [[]],
        ]
        + [[None], {"": None}, "é" * 3, float("nan"), float("inf"), "2026-01-01", {"fingerprint": 3}]
    )


def places(value, path=()):
    """Paths of everything in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def mutate(record, rng):
    for _ in range(rng.randint(1, 4)):
        *path, last = rng.choice(list(places(record)))
        target = record
        for key in path:
            target = target[key]
        if rng.random() < 0.2 and isinstance(target, dict):
            del target[last]
        else:
            target[last] = values(rng)
    return record


@pytest.mark.parametrize("count", [30, slow_case(2000)], ids=["some", "many"])
def test_a_row_with_anything_in_it_is_reported_or_left_out(count, tmp_path, monkeypatch):
    monkeypatch.setattr(statistics.draws, "__defaults__", (20,))
    monkeypatch.setattr(leaderboard, "_PARETO_DRAWS", 20)
    rng = random.Random(count)
    base = made.sweep(tmp_path / "sweep", blocks=2, techniques={"gqa": (1, 1, 1), "mqa": (2, 1, 1)})
    made.row(tmp_path / "alone", aec_w=300.0, al_s=0.5, conditions=None)
    texts = [file.read_text() for file in sorted(tmp_path.rglob("record.json"))]
    for trial in range(count):
        rng.seed(trial)
        folder = base / "mutated"
        folder.mkdir(exist_ok=True)
        (folder / "record.json").write_text(json.dumps(mutate(json.loads(rng.choice(texts)), rng)))
        try:
            collected = find_rows.collect_rows([tmp_path])
        except UserError as error:
            raise AssertionError(f"trial {trial}: nothing is left") from error
        try:
            shown = leaderboard.build_leaderboard(collected.rows, collected.orphans) | {
                "left_out": collected.left_out,
                "grids": [],
            }
            json.dumps(shown, allow_nan=False)
            write_files.rows_csv(collected.rows, shown["columns"])
            markdown.markdown_report(shown, {})
            json.dumps(details.run_details(collected.rows, tmp_path), allow_nan=False)
        except Exception as error:
            raise AssertionError(f"trial {trial}: {error!r}") from error


@pytest.mark.parametrize("count", [100, slow_case(3000)], ids=["some", "many"])
def test_a_row_with_anything_in_it_is_compared_or_refused(count, tmp_path, capsys):
    rng = random.Random(count)
    for name, mixer in (("a", "gqa"), ("b", "mqa")):
        for seed in range(2):
            values = {"al_s": 0.5 + seed / 100, "j_per_token": 3.0, "amu_gb": 1.0, "eval_loss": 3.0}
            made.row(tmp_path / name / str(seed), mixer, seed=seed, conditions=None, **values)
    file = tmp_path / "b" / "1" / "record.json"
    text, statuses = file.read_text(), set()
    for trial in range(count):
        rng.seed(trial)
        file.write_text(json.dumps(mutate(json.loads(text), rng)))
        try:
            statuses.add(command.main(["--compare", str(tmp_path / "a"), str(tmp_path / "b")]))
        except Exception as error:
            raise AssertionError(f"trial {trial}: {error!r}") from error
        captured = capsys.readouterr()
        assert captured.out.strip() or len(captured.err.strip().splitlines()) <= 2
    assert statuses >= {0, 2}


def test_what_lies_beside_a_row_cannot_stop_a_report(tmp_path):
    """FIFOs, devices and loops in the place of logs, answers and event files, and event files that are none."""
    for i, name in enumerate(("log.txt", "output.txt", "samples", "events.out.tfevents.1", "config.json")):
        folder = tmp_path / "runs" / str(i)
        made.row(folder, seed=i, outcome="ok" if i % 2 else "crash", al_s=0.5 + i)
        os.mkfifo(folder / name)
        made.curves(tmp_path / "runs" / f"cut{i}", steps=20)
        (event,) = (tmp_path / "runs" / f"cut{i}").glob("events*")
        content = bytearray(event.read_bytes())
        content[i * 100] ^= 0xFF
        event.write_bytes(content[: len(content) - 17 * i])
        made.row(event.parent, seed=10 + i, al_s=0.5 + i)
    (tmp_path / "runs" / "endless").mkdir()
    (tmp_path / "runs" / "endless" / "config.json").write_text("{}")
    (tmp_path / "runs" / "endless" / "log.txt").symlink_to("/dev/zero")
    assert command.main([str(tmp_path / "runs"), f"--out={tmp_path / 'report'}"]) == 0
    assert (tmp_path / "report" / "index.html").exists()


def test_a_path_that_no_report_can_hold_is_left_out(tmp_path, capsys):
    made.row(tmp_path / "runs" / "good", al_s=0.5)
    made.row(tmp_path / "runs" / "two\nlines", al_s=0.6)
    bad = os.fsencode(tmp_path / "runs") + b"/\xff"
    shutil.copytree(tmp_path / "runs" / "good", os.fsdecode(bad))
    os.makedirs(os.fsdecode(bad + b"2"))
    with open(bad + b"2/config.json", "w") as file:
        file.write("{}")
    assert command.main([str(tmp_path / "runs"), f"--out={tmp_path / 'report'}"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("rename it" in line for line in lines)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device", "x.json"), "cannot be written: No space left on device: x.json"),
        (ModuleNotFoundError("no", name="scipy.special"), "pip install -e '.[report]'"),
    ],
)
def test_what_the_machine_lacks_is_one_line(tmp_path, error, message, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(write_files, "write_report", fail)
    made.row(tmp_path / "runs", al_s=0.5)
    assert command.main([str(tmp_path / "runs"), f"--out={tmp_path / 'report'}"]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_whose_runs_have_not_ended_says_so(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no record.json in it, 1 runs that have not ended"):
        find_rows.find_files([tmp_path])
