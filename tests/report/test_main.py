"""The command: exit statuses, what it writes, what it says of bad input, and what it never imports."""

import csv
import json
import subprocess
import sys

import pytest

from efficientllm.report import __main__ as command
from efficientllm.report import curves, page
from report import made

IMPORTS = """
import sys
from efficientllm.report import __main__ as command
assert command.main(sys.argv[1:]) == 0
print([name for name in {names} if name in sys.modules])
"""


def python(names, *argv):
    code = IMPORTS.format(names=names)
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, *map(str, argv)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept") / "sweep"
    made.sweep(folder, blocks=2, event_files=True)
    told = {"name": "attention", "variant": "mha", "baseline": "gqa", "block": 0, "order": 9, "seed": 0}
    made.row(folder / "oom", "mha", outcome="oom", sweep=told)
    return folder


@pytest.fixture(scope="module")
def reported(swept):
    out = swept.parent / "report"
    assert python(("jax", "torch", "transformers", "tensorflow"), swept, f"--out={out}") == "[]"
    return out


def test_the_files_and_that_they_agree(swept, reported):
    assert {file.name for file in reported.iterdir()} == {
        "index.html",
        "report.md",
        "rows.csv",
        "leaderboard.json",
        "figures",
    }
    lines = list(csv.DictReader((reported / "rows.csv").read_text().splitlines()))
    board = json.loads((reported / "leaderboard.json").read_text())
    assert len(lines) == board["rows"] == 9 and [line["outcome"] for line in lines].count("oom") == 1
    (group,) = board["groups"]
    (mla,) = [variant for variant in group["variants"] if variant["variant"] == "mla"]
    latencies = [float(line["al_s [s]"]) for line in lines if line["variant"] == "mla"]
    assert mla["cells"]["al_s"]["mean"] == pytest.approx((latencies[0] * latencies[1]) ** 0.5), "the geometric mean"
    assert all(line["aec_w [W]"] == "" for line in lines), "null is an empty field"
    text = (reported / "report.md").read_text()
    assert f"×{mla['cells']['al_s']['ratio']:.3f}" in text and "| mha | attention 0 | oom |" in text
    for claim in board["claims"]:
        assert f"| {claim['name']} |" in text


def test_figures_are_drawn_in_both_formats(reported):
    names = {file.name for file in (reported / "figures").iterdir()}
    of_claims = {name for name in names if name.startswith("claim_")}
    kinds = ("ratios", "pareto", "six", "loss")
    assert names - of_claims == {f"1_{kind}.{ending}" for kind in kinds for ending in ("png", "svg")}
    assert {"claim_mla-perplexity.svg", "claim_mqa-latency.svg"} <= of_claims
    assert (reported / "figures/1_loss.png").read_bytes().startswith(b"\x89PNG")
    assert (reported / "figures/1_loss.svg").read_text().count("<path") > 10


def test_the_page_is_one_file_that_loads_nothing(reported):
    text = (reported / "index.html").read_text()
    page = text[: text.index('<script id="plotly"')]
    assert "http://" not in page and "https://" not in page and "src=" not in page
    assert len(text) < 3e6 and "<!-- " not in page


def test_a_name_in_a_row_cannot_end_the_pages_script():
    name = "</script><script>alert(1)</script>"
    text = page.page_html({"columns": [], "groups": [], "claims": [], "failures": [{"variant": name}]}, {})
    assert name not in text and "\\u003c/script>" in text


def test_curves_are_read_back_and_thinned(swept):
    from efficientllm.report import rows

    (row,) = rows.read_rows([swept / "0-0-gqa" / "record.json"])
    curve = curves.read_curves(row)["loss"]
    assert len(curve["steps"]) == 200 and (curve["steps"][0], curve["steps"][-1]) == (1, 500)
    assert curve["values"][0] == 7.0 and curve["values"][-1] == pytest.approx(2.01)
    assert curves.thin_steps([1, 2, 3]) == [1, 2, 3]


def test_help_and_a_bad_flag_import_nothing_heavy():
    heavy = ("numpy", "scipy", "matplotlib", "plotly", "tensorboard", "jax", "pandas")
    assert python(heavy, "--help") == "[]"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ot=x", "a"], "did you mean '--out'"),
        (["a"], "--out=DIR is missing"),
        (["--out=x"], "no runs given"),
        (["nowhere", "--out=x"], "no such file or folder"),
        (["--compare", "a"], "takes two"),
        (["--compare", "a", "b", "--margin=2"], "a share from 0 to 1"),
        (["--compare", "a", "b", "--margin=x"], "invalid float"),
        (["{swept}", "--out=x", "--baseline=mlaa"], "did you mean 'mla'"),
        (["{swept}", "--out=/dev/null/x"], "cannot be written"),
        (["--compare", "{swept}", "{swept}", "--metric=al"], "did you mean 'al_s'"),
        (["--compare", "{swept}", "{swept}", "--metric=params_total"], "neither more nor less"),
        (["--compare", "{swept}", "{swept}", "--metric=aec_w"], "A's is null: not measured"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(argv, message, swept, capsys):
    assert command.main([argument.replace("{swept}", str(swept)) for argument in argv]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_no_arguments_print_the_help(capsys):
    assert command.main([]) == 2 and "--compare A B" in capsys.readouterr().out


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Three runs of one config each: as they were, the same but for noise, 20 % slower, and faster."""
    folder = tmp_path_factory.mktemp("sides")
    for name, factor in (("a", 1.0), ("same", 1.002), ("slower", 1.2), ("faster", 0.8), ("single", 1.2)):
        for seed in range(1 if name == "single" else 3):
            noise = 1 + 0.002 * ((seed * 7 + len(name)) % 3 - 1)
            values = {"al_s": 0.5 * factor * noise, "tokens_per_s": 1000 / factor / noise, "flops_per_token": 8e6}
            made.row(folder / name / str(seed), seed=seed, **values)
    made.row(folder / "gpu" / "0", devices=made.H100, al_s=0.5)
    made.row(folder / "heavier" / "0", flops_per_token=9e6)
    return folder


@pytest.mark.parametrize(
    ("a", "b", "more", "status", "message"),
    [
        ("a", "same", [], 0, "no regression seen"),
        ("a", "slower", [], 1, "B regressed against A"),
        ("slower", "a", [], 0, "better"),
        ("a", "faster", ["--metric=al_s"], 0, "better"),
        ("a", "slower", ["--metric=tokens_per_s"], 1, "worse"),
        ("a", "slower", ["--margin=0.5"], 0, "worse, within ±50%"),
        ("single", "heavier", ["--metric=flops_per_token"], 1, "worse"),
        ("a", "single", ["--metric=al_s"], 3, "3 and 1 rows: an interval needs two a side"),
    ],
)
def test_compare(sides, a, b, more, status, message, capsys):
    assert command.main(["--compare", str(sides / a), str(sides / b), *more]) == status
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ("a", "gpu", "the device of"),
        ("heavier", "single", "A's is null"),
    ],
)
def test_what_cannot_be_compared_is_said_and_exits_2(sides, a, b, message, capsys):
    assert command.main(["--compare", str(sides / a), str(sides / b), "--metric=al_s"]) == 2
    assert message in capsys.readouterr().err


def test_sides_without_a_common_metric_are_no_success(tmp_path, capsys):
    made.row(tmp_path / "a", pcu=0.5)
    made.row(tmp_path / "b", pcu=0.5)
    assert command.main(["--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "no metric in common" in capsys.readouterr().err


def test_sides_without_a_common_block_are_compared_unpaired(sides, tmp_path, capsys):
    for seed in range(3):
        made.row(tmp_path / str(seed), seed=seed + 10, al_s=0.6 + 0.001 * seed)
    assert command.main(["--compare", str(sides / "a"), str(tmp_path), "--metric=al_s"]) == 1
    assert "1.20" in capsys.readouterr().out


def test_sweeps_are_compared_variant_by_variant(tmp_path, capsys):
    made.sweep(tmp_path / "a", blocks=4, seed=1)
    slow = {**made.TRUE, "mla": (1.6, 1.1, 0.97)}
    made.sweep(tmp_path / "b", blocks=4, seed=2, techniques=slow)
    assert command.main(["--compare", str(tmp_path / "a"), str(tmp_path / "b"), "--metric=flops_per_token"]) == 1
    table = capsys.readouterr().out
    assert table.count("equal within") == 2 and table.count("worse") == 1
