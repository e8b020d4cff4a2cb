"""Confidence intervals for ratios from few processes: log-ratios paired by block, t intervals and bootstrap.

Functions take natural logarithms of ratios, one a block. Random draws are seeded: the same rows give the same numbers.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import nctdtr, ndtr, stdtrit

MARGIN = 0.02  # ratios from 1/1.02 to 1.02 count as equal
POWER = 0.8  # probability of detecting an effect that a sweep is planned for
WIDE = "cannot be told apart"
_WIDE_FACTOR = 2.0  # an interval around 1 that reaches half or twice is called wide
FEWEST_FOR_BOOTSTRAP = 6
DRAWS = 10_000
_SEED = 2505_13840


@dataclasses.dataclass(frozen=True)
class Interval:
    """A geometric mean ratio and its 95 % interval; `low` and `high` are None for a single block."""

    ratio: float
    low: float | None
    high: float | None
    blocks: int
    method: str


def geometric_mean(values: Sequence[float]) -> float | None:
    """The geometric mean: the ratio of two means is then the mean ratio. None for no values.

    The arithmetic mean if a value is not positive.
    """
    if not values:
        return None
    if min(values) == max(values):
        return values[0]
    if min(values) <= 0:
        return sum(values) / len(values)
    return math.exp(sum(map(math.log, values)) / len(values))


def ratio_interval(logs_B: npt.ArrayLike, exact: bool = False) -> Interval | None:
    """The Interval of log-ratios, one a block; None for no blocks. `exact` values need no second block.

    Student's t below six blocks, bootstrap over blocks from six on. The bootstrap's percentiles are widened after
    Hesterberg (2015, "What teachers should know about the bootstrap", section 5.3): plain ones cover about 88 % at
    n = 6.
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


def ratio_of_sums(a: Sequence[float], b: Sequence[float]) -> Interval:
    """The Interval of sum(a) / sum(b) for pairs, by the delta method for the logarithm, and Student's t over pairs."""
    shares = np.asarray(a, float) / np.sum(a) - np.asarray(b, float) / np.sum(b)
    return _interval_over_parts(math.log(float(np.sum(a) / np.sum(b))), shares)


def ratio_of_perplexities(a: Sequence[float], b: Sequence[float], weights: Sequence[float]) -> Interval:
    """The Interval of exp(sum(a) / sum(weights)) over that of `b`: losses summed over parts of the text, paired.

    Student's t over the parts for the mean difference, which is a ratio of sums (the delta method).
    """
    differences, weights_N = np.asarray(a, float) - np.asarray(b, float), np.asarray(weights, float)
    mean = float(differences.sum() / weights_N.sum())
    return _interval_over_parts(mean, (differences - mean * weights_N) / weights_N.sum())


def _interval_over_parts(mean, residuals_N):
    """The Interval of exp(mean); each part moves the mean by its residual."""
    n = len(residuals_N)
    half = stdtrit(n - 1, 0.975) * math.sqrt(n / (n - 1) * float((residuals_N**2).sum()))
    ratio, low, high = (_exp(mean + sign * half) for sign in (0, -1, 1))
    return Interval(ratio, low, high, 1, f"t over {n} parts of the held-out text")


def unpaired_interval(logs_a: Sequence[float], logs_b: Sequence[float]) -> Interval | None:
    """The Interval of b over a for rows that share no block: Welch's t on logs; None below two rows a side."""
    a, b = np.asarray(logs_a, float), np.asarray(logs_b, float)
    if min(len(a), len(b)) < 2:
        return None
    variances = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    mean, error = b.mean() - a.mean(), math.sqrt(sum(variances))
    weights = sum(variance**2 / (len(x) - 1) for variance, x in zip(variances, (a, b), strict=True))
    half = stdtrit(error**4 / weights, 0.975) * error if error else 0.0
    ratio, low, high = (_exp(mean + sign * half) for sign in (0, -1, 1))
    return Interval(ratio, low, high, min(len(a), len(b)), f"Welch t over {len(a)} and {len(b)} rows")


def draws(logs_VB: npt.ArrayLike, count: int = DRAWS) -> np.ndarray:
    """Draws `means_RV`, plausible means over blocks; a draw uses the same blocks for every variant.

    NaN marks a block that a variant lacks; each variant needs one block. From six blocks on, blocks are resampled.
    Below, draws are from the multivariate t with the variants' covariance; its margins are the t intervals.
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
    # A resample without any block of a variant keeps that variant's mean.
    return np.where(n_RV > 0, times_RB @ filled_VB.T / np.maximum(n_RV, 1), mean_V)


def verdict(interval: Interval | None, better: str | None, margin: float = MARGIN) -> str:
    """The verdict on an Interval in words. "no difference seen" is not "equal": that needs an interval within ±2 %."""
    if interval is None or interval.low is None:
        return "not tested"
    sure = not interval.low <= 1 <= interval.high
    words = {"lower": ("worse", "better"), "higher": ("better", "worse")}.get(better, ("higher", "lower"))
    word = words[0] if interval.ratio > 1 else words[1]
    if 1 / (1 + margin) <= interval.low and interval.high <= 1 + margin:
        return f"{word}, within ±{margin:.0%}" if sure else f"equal within ±{margin:.0%}"
    if is_wide(interval.low, interval.high):
        return WIDE
    return word if sure else "no difference seen"


def is_wide(low: float | None, high: float | None) -> bool:
    """True if an interval is too wide for a verdict: it contains 1 and reaches a factor of _WIDE_FACTOR."""
    return low is not None and low <= 1 <= high and (low < 1 / _WIDE_FACTOR or high > _WIDE_FACTOR)


def _exp(log):
    """exp without overflow."""
    return math.exp(max(-700.0, min(700.0, log)))


@dataclasses.dataclass(frozen=True)
class Noise:
    """Noise of the baseline against itself, and the effects that a sweep can detect above it.

    spread:       standard deviation of the log-ratio of one pair of runs.
    smallest:     the effect, as a ratio minus 1, that this number of blocks detects in four sweeps of five.
    blocks_for_3: blocks needed to detect an effect of 3 % as often.
    share:        spread of a comparison over the spread of a pair; see `estimate_noise`.
    """

    interval: Interval
    spread: float
    smallest: float | None
    blocks_for_3: int
    share: float = 1.0


def estimate_noise(pairs_B: npt.ArrayLike, baselines: int = 1, blocks: int | None = None) -> Noise | None:
    """Estimates the Noise from log-ratios of the baseline to itself, one pair a block; None below two pairs.

    A comparison divides by the mean of `baselines` runs: its spread is sqrt((1 + 1/baselines) / 2) times a pair's.
    """
    pairs_B = np.asarray(pairs_B, float)
    if len(pairs_B) < 2:
        return None
    spread = pairs_B.std(ddof=1)
    share = math.sqrt((1 + 1 / baselines) / 2)
    effects = smallest_effect(share * spread, blocks or len(pairs_B)), blocks_needed(share * spread, 0.03)
    return Noise(ratio_interval(pairs_B), spread, *effects, share)


def noise_reach(noise: Noise) -> float:
    """The largest log-ratio that noise explains: the far end of the baseline's own 95 % interval, times `share`."""
    return noise.share * max(-math.log(noise.interval.low), math.log(noise.interval.high))


def within_noise(interval: Interval, noise: Noise, limit: float = 1.0) -> bool:
    """True if noise alone could explain the verdict on an interval against `limit`.

    The interval lies on one side of `limit` but no further away than `noise_reach`. A verdict "equal" is within noise
    only if the noise interval itself is too wide for a verdict.
    """
    if interval.low is None or interval.low <= limit <= interval.high:
        return (
            limit == 1
            and verdict(interval, None).startswith("equal")
            and is_wide(noise.interval.low, noise.interval.high)
        )
    return max(abs(math.log(end / limit)) for end in (interval.low, interval.high)) <= noise_reach(noise)


def power(effect: float, spread: float, blocks: int) -> float:
    """The probability that the 95 % t interval over `blocks` excludes 1 for a true ratio of 1 + `effect`.

    `spread` is the standard deviation of the log-ratio in one block. Exact, by the noncentral t distribution.
    """
    return _power_at(math.log1p(effect) * math.sqrt(blocks) / spread, blocks)


def _power_at(noncentrality, blocks):
    quantile = stdtrit(blocks - 1, 0.975)
    # The far tail is NaN in scipy 1.17 where it is below its precision, as at two blocks.
    far_tail = np.nan_to_num(nctdtr(blocks - 1, noncentrality, -quantile))
    return float(nctdtr(blocks - 1, -noncentrality, -quantile) + far_tail)


def smallest_effect(spread: float, blocks: int) -> float | None:
    """The effect, a ratio minus 1, that a 95 % t interval over `blocks` detects with a probability of POWER."""
    if blocks < 2:
        return None
    return math.expm1(_noncentrality(blocks) * spread / math.sqrt(blocks))


@functools.cache
def _noncentrality(blocks):
    """The mean over its standard error with which the t test over `blocks` has a power of POWER."""
    low, high = 0.0, 64.0  # 16.2 at two blocks, 2.8 at many
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _power_at(middle, blocks) < POWER else (low, middle)
    return high


def blocks_needed(spread: float, effect: float, most: int = 10_000) -> int:
    """The fewest blocks (at least two) that detect `effect`; at most `most`."""
    low, high = 2, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if smallest_effect(spread, middle) <= effect else (middle + 1, high)
    return low


def blocks_to_decide(interval: Interval, limit: float = 1.0, most: int = 1000) -> int | None:
    """The blocks with which an interval of this spread would exclude `limit` with a probability of POWER.

    The true ratio is taken to be the one seen. At most `most`; None for an interval without ends.
    """
    if interval.low is None or interval.blocks < 2:
        return None
    half = (math.log(interval.high) - math.log(interval.low)) / 2
    spread = half * math.sqrt(interval.blocks) / stdtrit(interval.blocks - 1, 0.975)
    effect = abs(math.log(interval.ratio / limit))
    return blocks_needed(spread, math.expm1(effect), most) if effect else most


@dataclasses.dataclass(frozen=True)
class PairedSpread:
    """Standard deviation of a log-ratio in one block, pooled over variants with `degrees` degrees of freedom."""

    value: float
    degrees: int


def paired_spread(logs_VB: Sequence[npt.ArrayLike]) -> PairedSpread | None:
    """Pools the spread of log-ratios, a list of blocks for each variant; None if no variant has two blocks."""
    logs = [np.asarray(logs_B, float) for logs_B in logs_VB]
    degrees = sum(len(logs_B) - 1 for logs_B in logs if len(logs_B) > 1)
    squares = sum(float(((logs_B - logs_B.mean()) ** 2).sum()) for logs_B in logs if len(logs_B) > 1)
    return PairedSpread(math.sqrt(squares / degrees), degrees) if degrees else None
