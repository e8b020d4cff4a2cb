"""Ratios of two held-out losses on the same text, paired by its parts: for weights that have no seed.

A row of inference scores given weights: another process gives the same loss, and what varies is the text. Its
`sources.eval_loss.parts` has a `[sum, weight]` for each batch of held-out text.
"""

import numpy as np

from efficientllm.report import statistics
from efficientllm.report.rows import Row
from efficientllm.untrusted import json_text

LOSSES = ("eval_loss", "bits_per_byte")  # means over the text, whose ratio is that of its sums
METRICS = (*LOSSES, "perplexity")


def text_interval(key: str, row: Row, other: Row) -> statistics.Interval | None:
    """The Interval of a metric of METRICS of `row` over that of `other`, over parts of the text.

    None for other metrics, and unless both are rows of inference with the same parts, two or more.
    """
    if key not in METRICS:
        return None
    parts = [_parts(side) for side in (row, other)]
    if row.kind != "infer" or None in parts or [w for _, w in parts[0]] != [w for _, w in parts[1]]:
        return None
    losses = [[loss for loss, _ in side] for side in parts]
    if key in LOSSES:
        return statistics.ratio_of_sums(*losses)
    return statistics.ratio_of_perplexities(*losses, [weight for _, weight in parts[0]])


def _parts(row):
    """The parts of a row's held-out loss, or None if it has no two of them, all positive numbers."""
    parts = row.record["sources"].get("eval_loss", {}).get("parts")
    if not isinstance(parts, list) or len(parts) < 2:
        return None
    pairs = all(isinstance(part, list) and len(part) == 2 and all(map(json_text.is_number, part)) for part in parts)
    return parts if pairs and np.min(parts) > 0 else None
