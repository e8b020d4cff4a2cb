"""`index.html`: template, style, scripts, data and plotting library in one file that opens from disk."""

import base64
import gzip
import importlib.resources
import json

from efficientllm.report import study, techniques

SCRIPTS = ("format.js", "query.js", "table.js", "details.js", "charts.js", "sections.js", "address.js", "main.js")


def html(board, curves, details=None):
    """The page of a leaderboard, of `{path: curves}` and of `details.details`."""
    data = {"board": board, "curves": curves, "details": details or {"runs": {}, "texts": []}, "study": _study()}
    # A "<" inside a string could end the script element.
    embedded = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {
        "STYLE": _file("style.css"),
        "DATA": embedded,
        "SCRIPTS": "\n".join(_file(name) for name in SCRIPTS),
        "PLOTLY": plotly(),
    }
    text = _file("index.html")
    for name, part in parts.items():
        text = text.replace(f"<!-- {name} -->", part)
    return text


def plotly():
    """plotly.js as the Python package carries it, in gzip and base64: 2 MB, not 5; the page unpacks it."""
    package = importlib.resources.files("plotly.package_data")
    return base64.b64encode(gzip.compress(package.joinpath("plotly.min.js").read_bytes(), mtime=0)).decode()


def _file(name):
    return importlib.resources.files("efficientllm.report").joinpath(f"page/{name}").read_text(encoding="utf-8")


def _study():
    """The study's tables that hold metrics of rows of ours, by axis."""
    tables = study.tables()
    return {
        axis: [{**tables[name], "table": name, "trust": study.TRUST[tables[name]["trust"]]} for name in names]
        for axis, names in techniques.TABLES.items()
    }
