"""Intervals against closed formulas and scipy, and their coverage by simulation."""

import numpy as np
import pytest
from scipy import stats

from efficientllm.report import ranking, statistics
from efficientllm.report.statistics import Interval

pytestmark = pytest.mark.quick

LOGS = np.log([1.10, 1.14, 1.08, 1.16])


def test_few_blocks_give_the_t_interval_on_logs():
    interval = statistics.ratio_interval(LOGS)
    expected = np.exp(stats.t.interval(0.95, 3, loc=LOGS.mean(), scale=stats.sem(LOGS)))
    assert interval.ratio == pytest.approx(np.exp(LOGS.mean()))
    assert (interval.low, interval.high) == pytest.approx(tuple(expected))


def test_the_values_shown_have_the_ratios_shown():
    a, b = [1.0, 2.0, 9.0], [2.0, 2.2, 7.0]
    paired = statistics.ratio_interval(np.log(b) - np.log(a)).ratio
    assert statistics.geometric_mean(b) / statistics.geometric_mean(a) == pytest.approx(paired)
    assert statistics.geometric_mean([-1.0, 3.0]) == 1 and statistics.geometric_mean([]) is None


def test_one_block_has_no_interval_and_none_has_nothing():
    assert statistics.ratio_interval([0.1]).low is None
    assert statistics.ratio_interval([]) is None
    assert statistics.ratio_interval([0.1], exact=True).low == pytest.approx(np.exp(0.1))
    assert statistics.ratio_interval([0.1, 0.2], exact=True).method != "exact", "values that vary are not exact"


@pytest.mark.parametrize("blocks", [3, 6, 12])
def test_the_interval_covers_the_truth_as_often_as_it_says(blocks, monkeypatch):
    monkeypatch.setattr(statistics.draws, "__defaults__", (2000,))
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        interval = statistics.ratio_interval(rng.normal(0.05, 0.03, blocks))
        covered += interval.low <= np.exp(0.05) <= interval.high
    # 400 trials at 0.95 have a standard error of 0.011; plain percentiles cover 0.88 at six blocks.
    assert 0.915 <= covered / 400 <= 0.985


def test_the_same_rows_give_the_same_numbers():
    logs = np.random.default_rng(1).normal(0, 0.1, 8)
    assert statistics.ratio_interval(logs) == statistics.ratio_interval(logs)


def test_draws_keep_what_variants_share():
    shared = np.random.default_rng(0).normal(0, 1, 8)
    draws_RV = statistics.draws([shared, shared + 0.1])
    assert np.allclose(draws_RV[:, 1] - draws_RV[:, 0], 0.1)
    few_RV = statistics.draws([shared[:4], shared[:4] + 0.1])
    assert np.allclose(few_RV[:, 1] - few_RV[:, 0], 0.1)


def test_draws_of_few_blocks_have_the_t_interval():
    low, high = np.quantile(statistics.draws([LOGS], 200_000)[:, 0], [0.025, 0.975])
    expected = stats.t.interval(0.95, 3, loc=LOGS.mean(), scale=stats.sem(LOGS))
    assert (low, high) == pytest.approx(expected, abs=3e-3)


def test_a_missing_block_is_left_out():
    logs_VB = np.array([[0.0, 0.1, 0.2, 0.1, 0.0, 0.2], [1.0, np.nan, 1.0, 1.0, 1.0, 1.0]])
    draws_RV = statistics.draws(logs_VB)
    assert np.allclose(draws_RV[:, 1], 1.0) and abs(draws_RV[:, 0].mean() - 0.1) < 0.01


def test_unpaired_rows_give_welchs_interval():
    a, b = np.log([1.0, 1.1, 0.9]), np.log([1.2, 1.3, 1.25, 1.28])
    expected = stats.ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    interval = statistics.unpaired_interval(a, b)
    assert (interval.low, interval.high) == pytest.approx((np.exp(expected.low), np.exp(expected.high)))
    assert statistics.unpaired_interval(a[:1], b) is None


@pytest.mark.parametrize(
    ("low", "high", "better", "verdict"),
    [
        (1.10, 1.20, "lower", "worse"),
        (1.10, 1.20, "higher", "better"),
        (0.80, 0.90, "lower", "better"),
        (0.95, 1.20, "lower", "no difference seen"),
        (0.99, 1.015, "lower", "equal within ±2%"),
        (1.005, 1.015, "lower", "worse, within ±2%"),
        (1.10, 1.20, None, "higher"),
        (None, None, "lower", "not tested"),
    ],
)
def test_verdict(low, high, better, verdict):
    ratio = 1.05 if low is None else (low + high) / 2
    assert statistics.verdict(Interval(ratio, low, high, 6, ""), better) == verdict


def test_noise_floor_against_simulation():
    """An effect of the stated size is seen in about four sweeps of five."""
    rng = np.random.default_rng(2)
    spread, blocks = 0.02, 5
    effect = np.log1p(statistics.smallest_effect(spread, blocks))
    seen = 0
    for _ in range(2000):
        interval = statistics.ratio_interval(rng.normal(effect, spread, blocks))
        seen += interval.low > 1
    assert 0.77 < seen / 2000 < 0.85
    n = statistics.blocks_needed(spread, 0.03)
    assert statistics.smallest_effect(spread, n) <= 0.03 < statistics.smallest_effect(spread, n - 1)


def test_power_is_that_of_the_noncentral_t_distribution():
    """Against scipy.stats, and the sample sizes of a published table of the paired t test (Cohen 1988, 80 %)."""
    for effect, spread, blocks in ((0.01, 0.004, 3), (0.01, 0.02, 8), (0.3, 0.1, 2), (0.002, 0.004, 40)):
        quantile, shift = stats.t.ppf(0.975, blocks - 1), np.log1p(effect) * np.sqrt(blocks) / spread
        right = stats.nct.sf(quantile, blocks - 1, shift) + stats.nct.cdf(-quantile, blocks - 1, shift)
        assert statistics.power(effect, spread, blocks) == pytest.approx(right, 1e-9)
    assert statistics.power(0.0, 0.01, 5) == pytest.approx(0.05, 1e-9)
    for standardised, blocks in ((0.2, 199), (0.5, 34), (0.8, 15)):
        assert statistics.blocks_needed(1.0, np.expm1(standardised)) == blocks
    for blocks in (2, 3, 5, 30):
        effect = statistics.smallest_effect(0.01, blocks)
        assert statistics.power(effect, 0.01, blocks) == pytest.approx(statistics.POWER, 1e-9)
    assert statistics.smallest_effect(0.01, 1) is None


def test_spread_is_pooled_over_variants_by_their_degrees_of_freedom():
    spread = statistics.paired_spread([[0.0, 0.02], [0.1, 0.1, 0.13], [5.0]])
    assert spread.degrees == 3 and spread.value == pytest.approx(np.sqrt((0.0002 + 0.0006) / 3))
    assert statistics.paired_spread([[1.0], []]) is None


def test_two_baselines_a_block_make_the_comparison_quieter():
    pairs = [0.02, -0.02, 0.03, -0.03]
    once, twice = (statistics.estimate_noise(pairs, baselines, 4).smallest for baselines in (1, 2))
    assert np.log1p(twice) / np.log1p(once) == pytest.approx(np.sqrt(0.75))
    assert statistics.estimate_noise([0.1]) is None


def test_ranks_and_wins_by_hand():
    draws_RV = np.array([[1.0, 2.0, 3.0], [2.0, 1.0, 3.0], [1.0, 2.0, 3.0], [1.0, 1.0, 3.0]])
    wins_VV = ranking.win_shares(draws_RV, "lower")
    assert wins_VV[0].tolist() == [0.5, 0.625, 1.0] and wins_VV[2, 0] == 0
    assert np.allclose(wins_VV + wins_VV.T, 1)
    assert ranking.rank_ranges([1.2, 1.4, 3.0], draws_RV, "lower") == [
        (1.0, 1.0, 2.0),
        (2.0, 1.0, 2.0),
        (3.0, 3.0, 3.0),
    ]
    assert ranking.rank_ranges([1.2, 1.4, 3.0], draws_RV, "higher")[2][0] == 1
    assert [rank for rank, *_ in ranking.rank_ranges([1.0, 1.0, 2.0], draws_RV, "lower")] == [1.5, 1.5, 3.0]


def test_pareto_by_hand():
    x_RV = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    y_RV = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    assert ranking.non_dominated_shares(x_RV, y_RV, "lower", "lower").tolist() == [1.0, 0.5, 0.5]
    assert ranking.non_dominated_shares(x_RV, y_RV, "lower", "higher").tolist() == [1.0, 0.5, 0.5]
    same = np.ones((1, 2))
    assert ranking.non_dominated_shares(same, same, "lower", "lower").tolist() == [1.0, 1.0], "equals do not dominate"


def test_normalisation_is_equations_10_and_11():
    assert ranking.normalise([2.0, 4.0, 3.0, None], "lower") == pytest.approx([1.0, 0.1, 0.55, None], nan_ok=True)
    assert ranking.normalise([2.0, 4.0], "higher") == pytest.approx([0.1, 1.0])
    assert ranking.normalise([2.0, 2.0], "lower") == [1.0, 1.0]
    assert ranking.normalise([None], "lower") == [None]


BETTER = {"amu_gb": "lower", "al_s": "lower", "aec_w": "lower", "throughput": "higher", "pcu": "higher"}


def test_efficiency_score_is_equation_12_with_the_better_way_up():
    table = {"amu_gb": [2, 4], "al_s": [1, 2], "aec_w": [10, 5], "throughput": [3, 6], "pcu": [0.5, 0.25]}
    scores, terms = ranking.efficiency_scores(table, BETTER)
    assert scores == pytest.approx([0.2 * (1 + 1 + 0.5 + 0.5 + 1), 0.2 * (0.5 + 0.5 + 1 + 1 + 0.5)]) and len(terms) == 5
    faster = ranking.efficiency_scores({**table, "al_s": [0.5, 2]}, BETTER)[0]
    assert faster[0] == scores[0] and faster[1] < scores[1], "a slow run is not rewarded"


def test_a_score_says_which_metrics_it_lacks():
    table = {"amu_gb": [2, 4], "al_s": [1, 2], "aec_w": [None, 5], "throughput": [3, 6], "pcu": [0.5, 0.5]}
    scores, terms = ranking.efficiency_scores(table, BETTER)
    assert "aec_w" not in terms and len(terms) == 4 and scores[0] == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert ranking.efficiency_scores({}, BETTER) == ([], [])


@pytest.mark.parametrize("blocks", [3, 6])
def test_withholding_what_is_within_noise_takes_little_power(blocks):
    """An effect of the promised size is still seen in about four sweeps of five, and noise is no difference."""
    rng, spread, trials = np.random.default_rng(blocks), 0.02, 300
    seen = {}
    for effect in (0.0, 1.0):
        seen[effect] = withheld = 0
        for _ in range(trials):
            first, last, other = rng.normal(0, spread, (3, blocks))
            size = effect * np.log1p(statistics.smallest_effect(spread * np.sqrt(1.5), blocks))
            interval = statistics.ratio_interval(other + size - (first + last) / 2)
            noise = statistics.estimate_noise(last - first, 2, blocks)
            hidden = statistics.within_noise(interval, noise)
            differs = not interval.low <= 1 <= interval.high
            seen[effect] += differs and not hidden
            withheld += differs and hidden
    assert 0.7 < seen[1.0] / trials < 0.88 and seen[0.0] / trials < 0.07


@pytest.mark.parametrize(
    ("low", "high", "noise", "limit", "within"),
    [
        (0.755, 0.864, (0.003, 105.0), 1.0, True),
        (0.755, 0.864, (0.9, 1.1), 1.0, False),
        (0.755, 0.864, (0.7, 1.4), 1.0, True),
        (0.9, 1.1, (0.7, 1.4), 1.0, False),  # no verdict to withhold
        (0.99, 1.01, (0.98, 1.03), 1.0, False),
        (0.99, 1.01, (0.1, 10.0), 1.0, True),
        (1.5, 1.7, (0.7, 1.4), 1.4, True),
        (3.9, 4.2, (0.9, 1.1), 3.7, False),
    ],
)
def test_what_is_within_noise(low, high, noise, limit, within):
    interval, around = (Interval((a * b) ** 0.5, a, b, 3, "") for a, b in ((low, high), noise))
    assert statistics.within_noise(interval, statistics.Noise(around, 0.1, None, 2), limit) is within
