"""The board of experiments/board: its page and tables from rows files and plans, and reruns of rows' commands."""

import csv
import json
import math
import random

import pytest

import runs
from efficientllm.record import rows_file
from efficientllm.registry.plugins import import_file
from efficientllm.report import find_rows, rows
from report import browser, made

board = import_file(runs.ROOT / "experiments/board/board.py")
rerun = import_file(runs.ROOT / "experiments/board/rerun.py")
PLANS = (runs.ROOT / "experiments/plan/rows.csv", *runs.ROOT.glob("experiments/*/plans.csv"))
PLANNED = sum(len(file.read_text().splitlines()) - 1 for file in PLANS)


def sweep(folder, name, measures, variants, task="pretrain", seeds=3, changes=None, **values):
    """Rows of a sweep; `variants` is `{name: (mixer, loss, time)}`, the first is the baseline."""
    rng = random.Random(name)
    baseline = next(iter(variants))
    for block in range(seeds):
        for order, (variant, (mixer, loss, seconds)) in enumerate(variants.items()):
            told = {"name": name, "variant": variant, "baseline": baseline, "block": block, "order": order}
            told |= {"seed": block, "measures": measures}
            ended = {"run": f"{name} {variant} {block}", "ended": f"2026-01-01T00:{10 + block}:00"}
            ended |= {"git": {"commit": "c" * 40, "dirty": False}}
            made.row(
                folder / f"{name}-{block}-{order}",
                mixer,
                seed=block,
                sweep=told,
                told=ended,
                task=task,
                changes={"task": task, **(changes or {})},
                eval_loss=loss * math.exp(rng.gauss(0, 0.002)),
                perplexity=math.exp(loss * math.exp(rng.gauss(0, 0.002))),
                al_s=seconds * math.exp(rng.gauss(0, 0.01)),
                flops_per_token=1e6 * seconds,
                **values,
            )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The board of a quality and a cost sweep at 4k tokens, and of inference; no adapter has rows."""
    out = tmp_path_factory.mktemp("board")
    attention = {
        "gqa": ("gqa", 4.0, 0.5),
        "mla": ("mla", 3.9, 0.7),
        "mqa": ("mqa", 4.1, 0.4),
        "nsa": ("nsa", 4.01, 0.3),
    }
    sweep(out / "a", "board_context_nano", "quality", attention, changes={"train.steps": 1000})
    sweep(out / "b", "board_costs_context_nano", "cost", attention, changes={"train.steps": 6})
    rows_file.pack_rows(out / "a", out / "rows" / "context.rows.jsonl")
    rows_file.pack_rows(out / "b", out / "rows" / "costs.rows.jsonl.gz")
    for form, loss, size in (("float32", 3.0, 540e6), ("int8", 3.001, 140e6), ("int4", 3.1, 80e6), ("nf4", 3.05, 90e6)):
        forms = {"int8": ("gqa", 3.0, 1.0)} if form == "int8" else {form: ("gqa", loss, 1.0)}
        changes = {"quant": form, "model.pretrained": "smollm2-135m"}
        sweep(
            out / "c" / form,
            f"board_infer_topics_{form}",
            "",
            forms,
            "infer",
            changes=changes,
            resident_weight_bytes=size,
        )
    for file in sorted((out / "c").rglob("record.json")):  # one sweep of four forms
        record = json.loads(file.read_text())
        record["sweep"] |= {"name": "board_infer_topics", "baseline": "float32"}
        file.write_text(json.dumps(record))
    rows_file.pack_rows(out / "c", out / "rows" / "infer.rows.jsonl")
    assert board.main([f"--rows={out / 'rows'}", f"--out={out / 'out'}"]) == 0
    return out / "out"


@pytest.mark.quick
def test_the_page_is_small_and_says_answers_counts_and_plans(folder):
    page = folder / "index.html"
    assert page.stat().st_size < board.MOST
    content = json.loads((folder / "leaderboard.json").read_text())
    context, adapter, form = content["answers"]
    assert context["query"] == "least al_s with eval_loss <= +1 %"
    (answer,) = context["answers"]
    assert answer["text"].startswith("nsa: al_s ") and "n = 3" in answer["text"] and "board_costs" in answer["group"]
    assert any(line.startswith("mqa: eval_loss is") for line in answer["out"]), "2.5 % more loss than the limit allows"
    assert adapter["missing"] == "No rows yet; experiments/board/tune.py supplies them."
    assert [a["text"].split(":")[0] for a in form["answers"]] == ["nf4"], "int4 has more loss, the others more bytes"
    facts = "\n".join(content["facts"])
    assert f"8 measured pairs of a model and a technique, from 36 rows; {PLANNED} planned ones" in facts
    assert "pairwise comparisons of quality" in facts and "hours on 1 x Test, 2 cores" in facts
    report = (folder / "report.md").read_text()
    for text in ("## Which attention for 4k contexts", "Asked as: `least al\\_s with", "experiments/plan/rows.csv"):
        assert text in report or text.replace("\\_", "_") in report


@pytest.mark.quick
def test_claims_have_figures_and_verdicts(folder):
    content = json.loads((folder / "leaderboard.json").read_text())
    tested = [claim for claim in content["claims"] if any("ratio" in pair for pair in claim["pairs"])]
    assert {claim["name"] for claim in tested} >= {"mla-perplexity", "mqa-latency"}
    report = (folder / "report.md").read_text()
    for claim in tested:
        svg = (folder / "figures" / f"claim_{claim['name']}.svg").read_text()
        assert svg.startswith("<svg") and f"![{claim['name']}](figures/claim_{claim['name']}.svg)" in report
    undecided = [claim for claim in tested if claim["status"] == "cannot be tested here"]
    assert all(claim["takes"] or claim["reason"] for claim in undecided)


@pytest.mark.quick
def test_every_row_has_commit_machine_date_and_command(folder):
    with open(folder / "rows.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 36
    for line in lines:
        assert (
            line["commit"] == "c" * 40 and line["device"] == "1 x Test, 2 cores" and line["started"].startswith("2026")
        )
        assert line["command"].startswith("python -m efficientllm.main --config=configs/base.py")


@pytest.mark.quick
def test_missing_rows_are_one_line(tmp_path, capsys):
    assert board.main([f"--rows={tmp_path / 'none'}"]) == 2 and rerun.main([f"--rows={tmp_path / 'none'}"]) == 2
    assert capsys.readouterr().err.count("no such file or folder") == 2


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(folder, tmp_path, width):
    page = browser.Browser(tmp_path)
    try:
        page.look(width)
        page.open(folder / "index.html")
        assert "nsa: al_s" in page.run("document.getElementById('answers-text').textContent")
        settings = page.run("document.getElementById('table-settings').textContent")
        assert "1,000 steps (1,024,000 tokens)" in settings and "6 steps (6,144 tokens)" in settings
        assert page.run("document.documentElement.scrollWidth") <= width, "nothing is wider than the window"
        assert page.run(
            "[...document.querySelectorAll('svg.interval')].every((figure) => figure.getBBox().width > 100)"
        )
        assert page.run("document.querySelectorAll('svg.interval').length") > 1
        assert not page.problems
    finally:
        page.close()


def test_a_rerun_of_another_variant_is_found(tmp_path):
    row, same, other = (
        rows.read_row(made.row(tmp_path / name, mixer, changes={"train.steps": steps}))
        for name, mixer, steps in (("a", "gqa", 1000), ("b", "gqa", 2), ("c", "mla", 2))
    )
    chosen = rerun.choose_rows(runs.ROOT / "tests/data/rows", 3)
    assert len(chosen) == 3 and {row.variant for row in chosen} == {"gqa", "mqa"}
    assert rerun.difference(row, same) == [] and rerun.difference(row, other) == ["model.mixer"]


@pytest.mark.slow
def test_three_rows_commands_make_rows_of_the_same_variants(capsys):
    """Of the board's rows files; where it has none yet, of the rows of three tiny runs."""
    committed = runs.ROOT / "experiments/board/rows"
    folder = committed if committed.is_dir() and find_rows.find_rows_files(committed) else runs.ROOT / "tests/data/rows"
    assert rerun.main([f"--rows={folder}", "--count=3"]) == 0
    assert capsys.readouterr().out.count("the same variant") == 3
