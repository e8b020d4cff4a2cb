"""Queries of limits, the language of the page (`page/query.js`), for programs.

QUERY      least|most METRIC [with CONDITION [and CONDITION ...]]
           CONDITION and ... and least|most METRIC
CONDITION  METRIC <= VALUE, or >=, <, >, =
VALUE      20 ms, 3.5 GB, 0.2; or against the baseline: +1 %, -5 %
"""

import dataclasses
import operator
import re
from collections.abc import Callable, Mapping

from efficientllm.errors import UserError, did_you_mean
from efficientllm.report.columns import Column

# `{unit, lower case: (unit of the metric, factor)}`; None is any metric's own.
UNITS = {
    **{"s": ("s", 1), "ms": ("s", 1e-3), "us": ("s", 1e-6), "µs": ("s", 1e-6), "min": ("s", 60)},
    **{"j": ("J", 1), "mj": ("J", 1e-3), "kj": ("J", 1e3), "w": ("W", 1), "mw": ("W", 1e-3), "kw": ("W", 1e3)},
    **{"b": ("bytes", 1), "kb": ("bytes", 1e3), "mb": ("bytes", 1e6), "gb": ("bytes", 1e9)},
    **{"kib": ("bytes", 1024), "mib": ("bytes", 1048576), "gib": ("bytes", 1073741824)},
    **{"/s": ("1/s", 1), "1/s": ("1/s", 1), "nat": ("nat", 1), "bit": ("bit", 1)},
    **{"flop": ("FLOP", 1), "gflop": ("FLOP", 1e9), "mflop": ("FLOP", 1e6)},
    **{"$": ("USD", 1), "usd": ("USD", 1), "g": ("g", 1), "kg": ("g", 1e3), "": (None, 1)},
}
ALIASES = {"memory": "peak_memory_bytes"}
HOLDS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "=": lambda a, b: abs(a - b) <= 1e-9 * abs(b),
}
_GOAL = re.compile(r"(least|lowest|min|most|highest|max)\s+([^<>=≤≥]+)", re.IGNORECASE)
_CONDITION = re.compile(r"(.*?)(<=|>=|≤|≥|<|>|==?)(.*)", re.DOTALL)
_VALUE = re.compile(r"([+-]?)\s*(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*(.*)", re.IGNORECASE | re.DOTALL)
_SIGNS = {"≤": "<=", "≥": ">=", "==": "="}


@dataclasses.dataclass(frozen=True)
class Condition:
    """A limit of a metric: `absolute` in the metric's unit, or `relative` to the baseline's value (1.01 for +1 %)."""

    key: str
    sign: str
    text: str
    absolute: float | None = None
    relative: float | None = None

    @property
    def bound(self) -> float:
        return self.relative if self.absolute is None else self.absolute

    def holds(self, value: float) -> bool:
        """Whether it holds of a value, or of a ratio to the baseline where it is relative."""
        return HOLDS[self.sign](value, self.bound)


@dataclasses.dataclass(frozen=True)
class Query:
    """The metric that is least, or with `most` most, among all that satisfy the conditions; None asks for no order."""

    goal: str | None
    most: bool
    conditions: tuple[Condition, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """The metrics that it asks for, each once."""
        keys = [condition.key for condition in self.conditions] + ([self.goal] if self.goal else [])
        return tuple(dict.fromkeys(keys))


def parse_query(text: str, columns: Mapping[str, Column]) -> Query:
    """Reads a query over the metrics `columns`, by key. Raises UserError that says what would be right."""
    first = re.match(r"\s*(?:least|lowest|min|most|highest|max)\s", text, re.IGNORECASE)
    text = re.sub(r"\s+(?:with|where|if)\s+", " and ", text, count=1, flags=re.IGNORECASE) if first else text
    clauses = [clause.strip() for clause in re.split(r"\s+and\s+|\s*[,;]\s*", text.strip(), flags=re.IGNORECASE)]
    goals = [match for clause in clauses if (match := _GOAL.fullmatch(clause))]
    if len(goals) > 1:
        raise UserError(f"{goals[1][0]!r}: one metric can be best, and {goals[0][0]!r} is; write it as a condition")
    conditions = [_parse_condition(clause, columns) for clause in clauses if clause and not _GOAL.fullmatch(clause)]
    if not goals:
        return Query(None, False, tuple(conditions))
    most = goals[0][1].lower() in ("most", "highest", "max")
    return Query(find_metric(goals[0][2], columns), most, tuple(conditions))


def find_metric(text: str, columns: Mapping[str, Column]) -> str:
    """The key that a text names: the key, its label, or the key without its unit. Raises UserError."""
    names: dict[str, str] = {}
    for column in columns.values():
        for name in (column.key, column.label, re.sub(r"_(s|w|gb|bytes)$", "", column.key)):
            names.setdefault(_plain(name), column.key)
    names |= ALIASES
    if key := names.get(_plain(text)):
        return key
    raise UserError(f"no metric {text.strip()!r}{did_you_mean(text.strip(), columns)}; known: {', '.join(columns)}")


def _plain(text):
    return re.sub(r"[^a-z0-9$]", "", text.lower())


def _parse_condition(text, columns):
    match = _CONDITION.fullmatch(text)
    if not match:
        raise UserError(f"{text!r} is no condition; write METRIC <= VALUE, such as tpot_s <= 20 ms, or least METRIC")
    key = find_metric(match[1], columns)
    sign = _SIGNS.get(match[2], match[2])
    return Condition(key, sign, text, **_parse_value(match[3].strip(), columns[key]))


def _parse_value(text, column):
    match = _VALUE.fullmatch(text)
    if not match:
        raise UserError(f"{text!r} is no value for {column.key}; write 20 ms, 0.5, or +1 % of the baseline")
    sign, number, unit = match[1], float(match[2]), match[3].strip()
    signed = -number if sign == "-" else number
    if unit == "%":
        return {"relative": 1 + signed / 100} if sign else {"absolute": number / 100}
    of, factor = UNITS.get(unit.lower(), ("", 1))
    if column.unit == "GB" and of == "bytes":
        return {"absolute": signed * factor / 1e9}
    if of not in (None, column.unit):
        raise UserError(f"{unit!r} is no unit for {column.key}, which is in {column.unit}")
    return {"absolute": signed * factor}
