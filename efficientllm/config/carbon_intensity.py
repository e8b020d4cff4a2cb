"""Carbon intensity of `config.metrics.carbon`, `GRAMS g/kWh, SOURCE`: CO2 of electricity, and who says so."""

import re
import typing

from efficientllm.errors import UserError, short_repr

EXAMPLE = "381 g/kWh, Ember 2025, Germany"
MOST = 10_000  # g/kWh: ten times what a plant of lignite emits
_TEXT = re.compile(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*g\s*/\s*kWh\s*(?:,\s*(.*?)\s*)?", re.ASCII | re.IGNORECASE)


class CarbonIntensity(typing.NamedTuple):
    """Grams of CO2 a kilowatt-hour, and the source of the figure."""

    g_per_kwh: float
    source: str


def read_carbon(text: str) -> CarbonIntensity | None:
    """Reads `GRAMS g/kWh, SOURCE`; None of an empty text. Raises ValueError that says what is wrong and what to do."""
    if not text:
        return None
    match = _TEXT.fullmatch(text)
    if not match:
        raise ValueError(f"is no carbon intensity; write grams and where they are from, such as '{EXAMPLE}'")
    grams, source = float(match[1]), match[2]
    if not source:
        raise ValueError(f"does not say where the figure is from; write it after a comma, such as '{EXAMPLE}'")
    if grams > MOST:
        raise ValueError(f"is more than {MOST:,} g/kWh; write grams, such as '{EXAMPLE}'")
    return CarbonIntensity(grams, source)


def check_carbon(where: str, value: typing.Any, has_plugins: bool = False) -> None:
    """A carbon intensity with its source, or nothing."""
    try:
        read_carbon(value)
    except ValueError as error:
        raise UserError(f"{where} = {short_repr(value)}: {error}") from None
