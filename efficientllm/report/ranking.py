"""Ranks with intervals, win shares, Pareto probabilities, and the study's Efficiency Score."""

from collections.abc import Sequence

import numpy as np

MANY = 64  # variants; above it pairwise results (wins, Pareto probabilities) are left out: their arrays are V x V


def win_shares(draws_RV: np.ndarray, better: str, floor: float = 0.0) -> np.ndarray:
    """`wins_VV[i, j]`: the share of draws in which variant i beats j by more than `floor`; a tie counts half."""
    x_RV = draws_RV if better == "higher" else -draws_RV
    apart_RVV = x_RV[:, :, None] - x_RV[:, None, :]
    return (apart_RVV > floor).mean(0) + (abs(apart_RVV) <= floor).mean(0) / 2


def rank_ranges(
    means_V: np.ndarray, draws_RV: np.ndarray, better: str, floor: float = 0.0
) -> list[tuple[float, float, float]]:
    """`(rank, low, high)` per variant: rank of its mean, 95 % range over the draws. 1 is best; ties share the mean.

    A tie is a difference of at most `floor`, the noise of the baseline against itself.
    """
    of_means = _ranks(np.asarray(means_V)[None], better, floor)[0]
    low, high = np.quantile(_ranks(draws_RV, better, floor), [0.025, 0.975], axis=0, method="nearest")
    return list(zip(of_means.tolist(), low.tolist(), high.tolist(), strict=True))


def _ranks(x_RV, better, floor):
    x_RV = -x_RV if better == "higher" else x_RV
    if x_RV.shape[1] > MANY:
        return np.stack([_ranks_of(x_V, floor) for x_V in x_RV])
    apart_RVV = x_RV[:, :, None] - x_RV[:, None, :]
    return 1 + (apart_RVV > floor).sum(-1) + ((abs(apart_RVV) <= floor).sum(-1) - 1) / 2


def _ranks_of(x_V, floor):
    """Ranks of one draw by sorting: an array of all pairs of many variants would not fit into memory."""
    sorted_V = np.sort(x_V)
    before_V = np.searchsorted(sorted_V, x_V - floor, "left")
    return 1 + before_V + (np.searchsorted(sorted_V, x_V + floor, "right") - before_V - 1) / 2


def non_dominated_shares(x_RV: np.ndarray, y_RV: np.ndarray, x_better: str, y_better: str) -> np.ndarray:
    """The share of draws in which no other variant is at least as good on both metrics and better on one."""
    x_RV = -x_RV if x_better == "higher" else x_RV
    y_RV = -y_RV if y_better == "higher" else y_RV
    dominated_RV = np.zeros(x_RV.shape, bool)
    for j in range(x_RV.shape[1]):
        xj, yj = x_RV[:, j : j + 1], y_RV[:, j : j + 1]
        dominated_RV |= (xj <= x_RV) & (yj <= y_RV) & ((xj < x_RV) | (yj < y_RV))
    return 1 - dominated_RV.mean(0)


def normalise(values: Sequence[float | None], better: str) -> list[float | None]:
    """Eq. 10-11 of the study: min-max to 0.1..1 over the group with 1 best; None stays None, all equal are 1."""
    numbers = [value for value in values if value is not None]
    low, high = min(numbers, default=0), max(numbers, default=0)
    if low == high:
        return [None if value is None else 1.0 for value in values]
    best, worst = (high, low) if better == "higher" else (low, high)
    return [None if value is None else 0.1 + 0.9 * (value - worst) / (best - worst) for value in values]


SCORED = ("amu_gb", "al_s", "aec_w", "throughput", "pcu")


def efficiency_scores(table: dict[str, list], better: dict[str, str]) -> tuple[list[float], list[str]]:
    """Eq. 12 over a group: `(scores, metrics used)` from `{metric: values, one a variant}`.

    A variant's score is the mean of min(x)/x (lower is better) and x/max(x) (higher is better). As printed, two of
    the five ratios reward slow runs; their direction is corrected here. A metric that one variant lacks, or that is
    not positive, is left out for all. With fewer than five metrics it is another score: print the metrics.
    """
    metrics = [key for key in SCORED if all(value is not None and value > 0 for value in table.get(key) or [None])]
    ratios = []
    for key in metrics:
        values = np.asarray(table[key], float)
        ratios.append(values / values.max() if better[key] == "higher" else values.min() / values)
    return (np.mean(ratios, 0).tolist() if metrics else []), metrics
