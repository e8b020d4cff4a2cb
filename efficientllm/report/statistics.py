"""Ratios with intervals from few processes: paired in logs, replicated over blocks.

Everything takes natural logarithms of ratios, one a block, and is seeded: the same rows give the same numbers.
"""

import dataclasses
import math

import numpy as np
from scipy.special import ndtr, stdtrit

MARGIN = 0.02  # ratios from 1/1.02 to 1.02 count as equal
WIDE = "cannot be told apart"
_SAYS_NOTHING = 2.0  # an interval that holds equal, half and twice as much
FEWEST_FOR_BOOTSTRAP = 6
DRAWS = 10_000
_SEED = 2505_13840


@dataclasses.dataclass(frozen=True)
class Interval:
    """A geometric mean ratio and its 95 % interval; `low` and `high` are None where one block is all there is."""

    ratio: float
    low: float | None
    high: float | None
    blocks: int
    method: str


def centre(values):
    """The geometric mean, so that ratios of what is shown are the ratios that are shown; None for no values.

    Of values that are not all positive it is the arithmetic mean.
    """
    if not values:
        return None
    if min(values) == max(values):
        return values[0]
    if min(values) <= 0:
        return sum(values) / len(values)
    return math.exp(sum(map(math.log, values)) / len(values))


def ratio_interval(logs_B, exact=False):
    """The Interval of log-ratios, one a block; `None` for none. `exact` values need no second block.

    Bootstrap over blocks from six on, below that Student's t. The bootstrap's percentiles are widened as Hesterberg
    (2015, "What teachers should know about the bootstrap", section 5.3) proposes: plain ones cover about 88 % at n = 6.
    """
    logs_B = np.asarray(logs_B, float)
    n = len(logs_B)
    if n == 0:
        return None
    mean = logs_B.mean()
    if exact and np.ptp(logs_B) == 0:
        return Interval(_exp(mean), _exp(mean), _exp(mean), n, "exact")
    if n == 1:
        return Interval(_exp(mean), None, None, 1, "one block: no interval")
    if n < FEWEST_FOR_BOOTSTRAP:
        half = stdtrit(n - 1, 0.975) * logs_B.std(ddof=1) / math.sqrt(n)
        low, high, method = mean - half, mean + half, f"t over {n} blocks"
    else:
        tail = ndtr(-math.sqrt(n / (n - 1)) * stdtrit(n - 1, 0.975))
        low, high = np.quantile(draws(logs_B[None])[:, 0], [tail, 1 - tail])
        method = f"bootstrap over {n} blocks"
    return Interval(_exp(mean), _exp(low), _exp(high), n, method)


def unpaired_interval(logs_a, logs_b):
    """The Interval of b over a for rows that share no block: Welch's t on logs; None below two rows a side."""
    a, b = np.asarray(logs_a, float), np.asarray(logs_b, float)
    if min(len(a), len(b)) < 2:
        return None
    parts = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    mean, error = b.mean() - a.mean(), math.sqrt(sum(parts))
    weights = sum(part**2 / (len(x) - 1) for part, x in zip(parts, (a, b), strict=True))
    half = stdtrit(error**4 / weights, 0.975) * error if error else 0.0
    ends = (_exp(mean + sign * half) for sign in (0, -1, 1))
    return Interval(*ends, min(len(a), len(b)), f"Welch t over {len(a)} and {len(b)} rows")


def draws(logs_VB, count=DRAWS):
    """`means_RV`: means over blocks as they might have come out, the same blocks drawn for every variant.

    NaN marks a block that a variant lacks; each variant needs one block. From six blocks on, blocks are resampled;
    below, draws are from the multivariate t with the variants' covariance, whose margins are the t intervals.
    """
    logs_VB = np.asarray(logs_VB, float)
    blocks = logs_VB.shape[1]
    rng = np.random.default_rng(_SEED)
    have_VB = np.isfinite(logs_VB)
    filled_VB = np.where(have_VB, logs_VB, 0.0)
    n_V = have_VB.sum(1)
    mean_V = filled_VB.sum(1) / n_V
    if blocks < FEWEST_FOR_BOOTSTRAP:
        off_VB = np.where(have_VB, logs_VB - mean_V[:, None], 0.0)
        scale_V = 1 / np.sqrt(np.maximum(n_V * (n_V - 1), 1))
        chi_R = np.sqrt(rng.chisquare(max(n_V.min() - 1, 1), count) / max(n_V.min() - 1, 1))
        return mean_V + rng.standard_normal((count, blocks)) @ off_VB.T * scale_V / chi_R[:, None]
    times_RB = rng.multinomial(blocks, np.full(blocks, 1 / blocks), size=count)
    n_RV = times_RB @ have_VB.T.astype(float)
    # A resample that leaves a variant without a block says nothing of it: its mean stands.
    return np.where(n_RV > 0, times_RB @ filled_VB.T / np.maximum(n_RV, 1), mean_V)


def verdict(interval, better, margin=MARGIN):
    """What an Interval says in words. "no difference seen" is not "equal", which needs an interval within +-2 %."""
    if interval is None or interval.low is None:
        return "not tested"
    sure = not interval.low <= 1 <= interval.high
    ways = {"lower": ("worse", "better"), "higher": ("better", "worse")}.get(better, ("higher", "lower"))
    word = ways[0] if interval.ratio > 1 else ways[1]
    if 1 / (1 + margin) <= interval.low and interval.high <= 1 + margin:
        return f"{word}, within ±{margin:.0%}" if sure else f"equal within ±{margin:.0%}"
    if is_wide(interval.low, interval.high):
        return WIDE
    return word if sure else "no difference seen"


def is_wide(low, high):
    """Whether an interval says nothing: it holds 1, and on one side of it a factor of _SAYS_NOTHING."""
    return low is not None and low <= 1 <= high and (low < 1 / _SAYS_NOTHING or high > _SAYS_NOTHING)


def _exp(log):
    """exp, within what a float holds."""
    return math.exp(max(-700.0, min(700.0, log)))


@dataclasses.dataclass(frozen=True)
class Noise:
    """What the baseline against itself shows: its ratio, the spread of a pair, and what a sweep can see with it.

    spread:       standard deviation of the log-ratio of one pair of runs.
    smallest:     the effect, as a ratio less 1, that this number of blocks sees in four sweeps of five.
    blocks_for_3: blocks that an effect of 3 % needs to be seen so.
    """

    interval: Interval
    spread: float
    smallest: float | None
    blocks_for_3: int
    share: float = 1.0  # of a pair's spread, that of a comparison with the mean of a block's baselines


def noise(pairs_B, baselines=1, blocks=None):
    """The Noise of log-ratios of the baseline to itself, one pair a block; None below two pairs.

    A comparison divides by the mean of `baselines` runs, so that its spread is sqrt((1 + 1/baselines) / 2) of a pair's.
    """
    pairs_B = np.asarray(pairs_B, float)
    if len(pairs_B) < 2:
        return None
    spread = pairs_B.std(ddof=1)
    share = math.sqrt((1 + 1 / baselines) / 2)
    effects = smallest_effect(share * spread, blocks or len(pairs_B)), blocks_needed(share * spread, 0.03)
    return Noise(ratio_interval(pairs_B), spread, *effects, share)


def reach(noise):
    """How far from 1, in logs, noise takes a comparison: as far as the baseline may be from itself (95 % interval),
    less what a comparison gains by dividing by the mean of a block's baselines."""
    return noise.share * max(-math.log(noise.interval.low), math.log(noise.interval.high))


def within_noise(interval, noise, limit=1.0):
    """Whether a verdict on an interval against `limit` says no more than the baseline does against itself: it is on one
    side of it, and no end of it is further away than the ends of that Noise's interval. An effect that a sweep can see
    (`Noise.smallest`) reaches further. "Equal" is within noise only where the noise itself says nothing.
    """
    if interval.low is None or interval.low <= limit <= interval.high:
        return (
            limit == 1
            and verdict(interval, None).startswith("equal")
            and is_wide(noise.interval.low, noise.interval.high)
        )
    return max(abs(math.log(end / limit)) for end in (interval.low, interval.high)) <= reach(noise)


def smallest_effect(spread, blocks):
    """The ratio less 1 that a 95 % t interval over `blocks` tells from 1 with a probability of about 80 %."""
    if blocks < 2:
        return None
    reach = stdtrit(blocks - 1, 0.975) + stdtrit(blocks - 1, 0.8)
    return math.expm1(reach * spread / math.sqrt(blocks))


def blocks_needed(spread, effect, most=10_000):
    """The fewest blocks (two at least) whose smallest effect is `effect`; `most` where it takes more."""
    low, high = 2, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if smallest_effect(spread, middle) <= effect else (middle + 1, high)
    return low
