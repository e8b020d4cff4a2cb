"""Standard errors of readings that are means of parts."""

import math

import numpy as np
import pytest

from efficientllm.metrics.reading import Reading, merge_parts, missing, ratio_error
from efficientllm.record.row import build_record

pytestmark = pytest.mark.quick


def parts_of(count, seed=0):
    """Sums and weights of batches of different sizes, whose quotient of totals is about 3."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(50, 250, count).astype(float)
    return list(zip((weights * rng.normal(3, 0.5, count)).tolist(), weights.tolist(), strict=True))


def test_of_equal_weights_it_is_that_of_a_mean():
    values = np.random.default_rng(0).normal(size=20)
    error = ratio_error([(4 * value, 4.0) for value in values])
    assert error == pytest.approx(np.std(values, ddof=1) / math.sqrt(20), rel=1e-12)


def test_it_is_the_spread_of_quotients_of_other_draws():
    """Of 2,000 draws, whose own spread is known to 1 / sqrt(2 x 2,000) = 1.6 %; three times that."""
    draws = [parts_of(200, seed) for seed in range(2000)]
    quotients = [sum(a for a, _ in parts) / sum(b for _, b in parts) for parts in draws]
    mean_square = np.mean([ratio_error(parts) ** 2 for parts in draws])
    assert math.sqrt(mean_square) == pytest.approx(np.std(quotients), rel=0.05)


@pytest.mark.parametrize("parts", [(), ((1.0, 2.0),), ((1.0, 2.0), (0.0, 0.0))])
def test_less_than_two_parts_with_a_weight_have_none(parts):
    assert ratio_error(parts) is None
    assert Reading(0.5, "nat", "text", parts=parts).standard_error is None


def test_merged_parts_have_the_same_totals():
    parts = parts_of(1000)
    for most in (256, 3, 1000):
        merged = merge_parts(parts, most)
        assert most / 2 < len(merged) <= most
        assert np.sum(merged, 0) == pytest.approx(np.sum(parts, 0), rel=1e-12)
    assert merge_parts(parts, 1000) == tuple(parts) and merge_parts([]) == ()


def test_a_row_holds_the_error_and_the_parts_where_there_are_any():
    parts = parts_of(3)
    reading = Reading(3.0, "nat", "held-out text", parts=tuple(parts))
    quality = {"eval_loss": reading, "perplexity": Reading(20.0, "1", "held-out text"), "loss": missing("nat", "none")}
    row = build_record(outcome="ok", name="", task="infer", config={}, provenance={}, quality=quality)
    entry = row["sources"]["eval_loss"]
    assert entry["standard_error"] == ratio_error(parts) and entry["parts"] == [list(part) for part in parts]
    assert all("parts" not in row["sources"][key] for key in ("perplexity", "loss", "al_s"))
