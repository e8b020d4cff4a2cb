"""`index.html`: template, style, scripts, data and plotting library in one self-contained file."""

import base64
import gzip
import importlib.resources
import json
import typing

from efficientllm.report import study_tables, techniques
from efficientllm.report.claim_figures import NAMESPACE
from efficientllm.report.curves import Curves

DIGITS = 7
SCRIPTS = (
    "format.js",
    "query.js",
    "table.js",
    "details.js",
    "charts.js",
    "pictures.js",
    "sections.js",
    "board.js",
    "address.js",
    "main.js",
)


def page_html(
    board: dict[str, typing.Any],
    curves: dict[str, Curves],
    details: dict[str, typing.Any] | None = None,
    pictures: dict[str, typing.Any] | None = None,
    claim_figures: dict[str, str] | None = None,
) -> str:
    """Renders the page of a leaderboard, of `{path: curves}`, `details.run_details` and `embed_pictures`.

    `claim_figures` are SVGs by the claim's name. A board's `answers`, `facts` and `planned` stand above and beside a
    report's own sections.
    """
    data: dict[str, typing.Any] = {"board": _brief(board), "curves": curves, "study": _study()}
    data |= {"pictures": pictures or {"runs": {}, "how": ""}, "claims": _elements(claim_figures or {})}
    # A "<" inside a string could end the script element.
    embedded = _json(data).replace("<", "\\u003c")
    sections = {
        "STYLE": _file("style.css"),
        "DATA": embedded,
        "DETAILS": _pack(_json(_brief(details or {"runs": {}, "texts": []})).encode()),
        "SCRIPTS": "\n".join(_file(name) for name in SCRIPTS),
        "PLOTLY": plotly_script(),
    }
    text = _file("index.html")
    for name, section in sections.items():
        text = text.replace(f"<!-- {name} -->", section)
    return text


def plotly_script() -> str:
    """plotly.js from the Python package, gzipped and in base64 (2 MB instead of 5); the page unpacks it."""
    package = importlib.resources.files("plotly.package_data")
    return _pack(package.joinpath("plotly.min.js").read_bytes())


def _elements(svgs):
    """SVGs as elements of a page: without the address of their namespace, as a page names no address."""
    return {name: svg.replace(f"{NAMESPACE} ", "") for name, svg in svgs.items()}


def _pack(data):
    return base64.b64encode(gzip.compress(data, mtime=0)).decode()


def _json(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _brief(value):
    """The value with numbers of DIGITS digits; leaderboard.json and rows.csv have all of them."""
    if isinstance(value, dict):
        return {key: _brief(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_brief(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _file(name):
    return importlib.resources.files("efficientllm.report").joinpath(f"page/{name}").read_text(encoding="utf-8")


def _study():
    """The study's tables by axis."""
    tables = study_tables.read_tables()
    return {
        axis: [{**tables[name], "table": name, "trust": study_tables.TRUST[tables[name]["trust"]]} for name in names]
        for axis, names in techniques.TABLES.items()
    }
