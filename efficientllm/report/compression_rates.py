"""MCR (Eq. 9) of rows of inference that measured no baseline, from the row of the group's baseline.

A sweep of forms serves its baseline once, as a variant, and not beside each form. The rate is what a run with
`config.infer.baseline` would record: bytes of the baseline's weights over the row's, times the ratio of qualities,
which of text are 2^-bits_per_byte.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from efficientllm.report import held_out_parts, statistics
from efficientllm.report.rows import Row
from efficientllm.report.techniques import techniques
from efficientllm.report.variant_names import compared_config

KEY, SIZE, LOSS = "mcr", "resident_weight_bytes", "bits_per_byte"
_FULL = ("float32", "bfloat16", "float16")  # precisions of weights that are not compressed
_MAY_DIFFER = ("quant", "infer.baseline")


def add_rates(rows: Sequence[Row], baseline: Iterable[Row]) -> list[Row]:
    """The rows, with a rate where one follows from a row of the baseline that differs in the form alone."""
    if not any(_is_scored(row) and not _is_full(row) for row in rows):
        return list(rows)
    originals = [row for row in baseline if _is_scored(row) and _is_full(row)]
    return [_with_rate(row, originals) for row in rows]


def _is_full(row):
    return techniques(row)["precision"] in _FULL


def _is_scored(row):
    values = row.values
    is_null = values.get(KEY) is None
    return row.ok and row.task == "infer" and is_null and bool(values.get(SIZE)) and values.get(LOSS) is not None


def _with_rate(row, originals):
    original = next((other for other in originals if _is_scored(row) and _but_form(row) == _but_form(other)), None)
    if original is None:
        return row
    rate = original.values[SIZE] / row.values[SIZE] * 2 ** (original.values[LOSS] - row.values[LOSS])
    source = {"source": f"bytes and 2^-{LOSS} of this row and of {original.variant}'s (Eq. 9)", "unit": "1"}
    return dataclasses.replace(
        row,
        values=row.values | {KEY: rate},
        reasons={key: reason for key, reason in row.reasons.items() if key != KEY},
        record=row.record | {"sources": row.record["sources"] | {KEY: source}},
    )


def _but_form(row):
    """What two rows must share: the config but for the form, and the text that was scored."""
    config = compared_config(row.config)
    shared = {key: value for key, value in config.items() if key not in _MAY_DIFFER}
    return shared, (row.record["provenance"].get("data") or {}).get("fingerprint")


def text_interval(key: str, row: Row, other: Row) -> statistics.Interval | None:
    """The Interval of the rate `key` of `row` over that of `other`, over parts of the text; see `held_out_parts`.

    None where the two rates are not of one baseline.
    """
    perplexity = held_out_parts.text_interval("perplexity", row, other)
    numbers = [[side.values.get(name) for name in (SIZE, LOSS, "eval_loss", key)] for side in (row, other)]
    if perplexity is None or perplexity.low is None or not all(map(all, numbers)):
        return None
    (size, bits, nats, rate), (size_of_other, _, _, rate_of_other) = numbers
    # Bits over bytes of text and nats over tokens are one sum: so many tokens is a byte.
    tokens_per_byte = bits * math.log(2) / nats

    def ratio(of_perplexities):
        return size_of_other / size * of_perplexities**-tokens_per_byte

    if not math.isclose(ratio(perplexity.ratio), rate / rate_of_other, rel_tol=1e-6):
        return None
    low, high = ratio(perplexity.high), ratio(perplexity.low)
    return dataclasses.replace(perplexity, ratio=ratio(perplexity.ratio), low=low, high=high)
