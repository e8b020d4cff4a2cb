"""Figures of names that are long, strange or many."""

import pytest
from PIL import Image

from efficientllm.report import __main__ as command
from report import made

NAMES = ["_hidden", "$\\frac{$", "a" * 300, "a" * 299 + "b", "中文 é 𝔸", "two\nlines", "|<b>&", ""]


def longest(file):
    with Image.open(file) as image:
        return max(image.size)


@pytest.mark.filterwarnings("error")
def test_strange_names_are_drawn_and_tabled(tmp_path):
    techniques = {name: (1 + i / 10, 1, 1) for i, name in enumerate(NAMES)}
    for block in range(2):
        for place, (name, (times, memory, loss)) in enumerate(techniques.items()):
            told = {"name": "x", "variant": name, "baseline": "_hidden", "block": block, "order": place, "seed": block}
            folder = tmp_path / "runs" / f"{block}-{place}"
            values = {"al_s": times, "amu_gb": memory, "pcu": 0.5 + place / 99, "tt_tokens_per_param_s": 1.0 + place}
            made.row(folder, sweep=told, seed=block, eval_loss=loss + place, **values)
            made.curves(folder, 3)
    assert command.main([str(tmp_path / "runs"), f"--out={tmp_path / 'out'}"]) == 0
    for kind in ("ratios", "pareto", "six", "loss"):
        assert longest(tmp_path / "out" / "figures" / f"1_{kind}.png") < 4000
    text = (tmp_path / "out" / "report.md").read_text()
    assert "<b>" not in text, "GitHub shows the name, and no bold text"
    for table in [paragraph.splitlines() for paragraph in text.split("\n\n") if paragraph.startswith("|")]:
        pipes = {line.replace("\\|", "").count("|") for line in table}
        assert len(pipes) == 1, "every line of a table has as many cells"


def test_two_hundred_variants_are_drawn_in_part(tmp_path):
    for i in range(60):
        changes = {"model.ffn": f"swiglu(hidden={i + 1})"}
        made.row(tmp_path / "runs" / str(i), al_s=1.0 + i, eval_loss=3.0 + i, flops_per_token=1e6 + i, changes=changes)
    assert command.main([str(tmp_path / "runs"), f"--out={tmp_path / 'out'}"]) == 0
    assert longest(tmp_path / "out" / "figures" / "1_ratios.png") < 2500
