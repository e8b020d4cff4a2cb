"""Who is before whom, and how sure that is: ranks, wins, Pareto sets, and the study's score."""

import numpy as np

MANY = 64  # variants beyond which no two of them are set beside each other: no wins, no probabilities of Pareto sets


def wins(draws_RV, better, floor=0.0):
    """`wins_VV[i, j]`: the share of draws in which variant i beats j by more than `floor`; a tie counts half."""
    x_RV = draws_RV if better == "higher" else -draws_RV
    apart_RVV = x_RV[:, :, None] - x_RV[:, None, :]
    return (apart_RVV > floor).mean(0) + (abs(apart_RVV) <= floor).mean(0) / 2


def ranks(means_V, draws_RV, better, floor=0.0):
    """`(rank, low, high)` a variant: of its mean, and the 95 % range of the draws. 1 is best, ties share the middle.

    A tie is a difference of at most `floor`, what the baseline shows against itself.
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
    """The ranks of one draw by sorting: every pair of many variants would fill the memory."""
    sorted_V = np.sort(x_V)
    before_V = np.searchsorted(sorted_V, x_V - floor, "left")
    return 1 + before_V + (np.searchsorted(sorted_V, x_V + floor, "right") - before_V - 1) / 2


def non_dominated(x_RV, y_RV, x_better, y_better):
    """The share of draws in which no other variant is at least as good on both metrics and better on one."""
    x_RV = -x_RV if x_better == "higher" else x_RV
    y_RV = -y_RV if y_better == "higher" else y_RV
    dominated_RV = np.zeros(x_RV.shape, bool)
    for j in range(x_RV.shape[1]):
        xj, yj = x_RV[:, j : j + 1], y_RV[:, j : j + 1]
        dominated_RV |= (xj <= x_RV) & (yj <= y_RV) & ((xj < x_RV) | (yj < y_RV))
    return 1 - dominated_RV.mean(0)


def normalised(values, better):
    """Eq. 10-11 of the study: min-max to 0.1..1 over the group with 1 best; None stays None, all equal are 1."""
    known = [value for value in values if value is not None]
    low, high = min(known, default=0), max(known, default=0)
    if low == high:
        return [None if value is None else 1.0 for value in values]
    best, worst = (high, low) if better == "higher" else (low, high)
    return [None if value is None else 0.1 + 0.9 * (value - worst) / (best - worst) for value in values]


SCORED = ("amu_gb", "al_s", "aec_w", "throughput", "pcu")


def efficiency_scores(table, better):
    """Eq. 12 over a group: `(scores, parts)` from `{metric: values, one a variant}`.

    Each variant's mean over min(x)/x (lower is better) and x/max(x) (higher is better): as printed, two of the five
    ratios reward slow runs, so that direction is corrected. A metric that one variant lacks, or that is not positive,
    leaves the score for all; `parts` names those that remain. Fewer than five make it another score: print `parts`.
    """
    parts = [key for key in SCORED if all(value is not None and value > 0 for value in table.get(key) or [None])]
    ratios = []
    for key in parts:
        values = np.asarray(table[key], float)
        ratios.append(values / values.max() if better[key] == "higher" else values.min() / values)
    return (np.mean(ratios, 0).tolist() if parts else []), parts
