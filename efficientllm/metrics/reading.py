"""`Reading`, a number of a row: value, unit and source, or null and the reason why it could not be measured."""

import dataclasses
import math
from collections.abc import Sequence

Part = tuple[float, float]  # a sum and the weight that divides it
MOST_PARTS = 256  # of a reading in a row


@dataclasses.dataclass(frozen=True)
class Reading:
    """A measured number, or null with a reason: never 0 for "unknown", never a guess.

    value:  number in `unit`, or None. NumPy and JAX scalars become Python numbers.
    source: origin of the number, e.g. `"nvml energy counter"`.
    reason: why `value` is None; None beside a value.
    parts:  of a mean, the sum and the weight of each of its parts, such as the batches of held-out text; `value` is the
            quotient of their totals.
    Raises ValueError for a value that is not finite, a null without a reason, and a reason beside a value.
    """

    value: int | float | None
    unit: str
    source: str
    reason: str | None = None
    parts: tuple[Part, ...] = ()

    def __post_init__(self):
        if hasattr(self.value, "item"):
            object.__setattr__(self, "value", self.value.item())
        if (self.value is None) == (self.reason is None):
            raise ValueError(f"a reading has either a value or a reason for null, not {self}")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"{self.value!r} is not finite: pass None and the reason ({self.source})")

    @property
    def standard_error(self) -> float | None:
        """Standard error of the mean of `parts`, as if they were independent; None without two of them."""
        return None if self.value is None else ratio_error(self.parts)


def ratio_error(parts: Sequence[Part]) -> float | None:
    """Computes the standard error of a quotient of totals (Cochran 1977, Eq. 6.13, of a large population)."""
    parts = [(part, weight) for part, weight in parts if weight]
    if len(parts) < 2:
        return None
    total = math.fsum(weight for _, weight in parts)
    quotient = math.fsum(part for part, _ in parts) / total
    squares = math.fsum((part - quotient * weight) ** 2 for part, weight in parts)
    return math.sqrt(squares * len(parts) / (len(parts) - 1)) / total


def merge_parts(parts: Sequence[Part], most: int = MOST_PARTS) -> tuple[Part, ...]:
    """Adds neighbours up, as many at a time as leave `most` parts at most."""
    size = -(-len(parts) // most) or 1
    groups = [parts[start : start + size] for start in range(0, len(parts), size)]
    return tuple((math.fsum(part for part, _ in group), math.fsum(weight for _, weight in group)) for group in groups)


def missing(unit: str, reason: str, source: str = "unavailable") -> Reading:
    """A null reading."""
    return Reading(None, unit, source, reason)


def finite_or_missing(value: float, unit: str, source: str, parts: Sequence[Part] = ()) -> Reading:
    """A reading of `value`, the mean of `parts`; a null reading with the reason if `value` is not finite."""
    if not math.isfinite(value):
        return missing(unit, f"not finite: {float(value)}", source)
    return Reading(value, unit, source, parts=merge_parts(parts))


def reading_or_missing(value: float | None, unit: str, source: str, reason: str) -> Reading:
    """A reading of `value`; a null reading with `reason` if `value` is None."""
    return missing(unit, reason) if value is None else Reading(value, unit, source)
