"""`Reading`, a number of a row: value, unit and source, or null and the reason why it could not be measured."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Reading:
    """A measured number, or null with a reason: never 0 for "unknown", never a guess.

    value:  number in `unit`, or None. NumPy and JAX scalars become Python numbers.
    source: origin of the number, e.g. `"nvml energy counter"`.
    reason: why `value` is None; None beside a value.
    Raises ValueError for a value that is not finite, a null without a reason, and a reason beside a value.
    """

    value: int | float | None
    unit: str
    source: str
    reason: str | None = None

    def __post_init__(self):
        if hasattr(self.value, "item"):
            object.__setattr__(self, "value", self.value.item())
        if (self.value is None) == (self.reason is None):
            raise ValueError(f"a reading has either a value or a reason for null, not {self}")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"{self.value!r} is not finite: pass None and the reason ({self.source})")


def missing(unit: str, reason: str, source: str = "unavailable") -> Reading:
    """A null reading."""
    return Reading(None, unit, source, reason)


def finite_or_missing(value: float, unit: str, source: str) -> Reading:
    """A reading of `value`; a null reading with the reason if `value` is not finite."""
    return (
        Reading(value, unit, source) if math.isfinite(value) else missing(unit, f"not finite: {float(value)}", source)
    )


def reading_or_missing(value: float | None, unit: str, source: str, reason: str) -> Reading:
    """A reading of `value`; a null reading with `reason` if `value` is None."""
    return missing(unit, reason) if value is None else Reading(value, unit, source)
