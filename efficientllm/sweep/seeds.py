"""Power calculation of a sweep: which difference in held-out loss its seeds can tell, and how many seeds tell 1 %."""

import math
import pathlib
import statistics as averages
from collections.abc import Sequence

from efficientllm.errors import UserError
from efficientllm.record.row import read_record
from efficientllm.report import statistics
from efficientllm.report.statistics import PairedSpread
from efficientllm.sweep.spec import Run, Sweep

EFFECT = 0.01
# Of the ratio of two held-out losses at one seed: experiments/attention, position and attention_free, 24 steps each.
USUAL = PairedSpread(0.0043, 32)
MOST = 1000  # seeds


def measure_spread(sweep: Sweep, runs: Sequence[Run], out: pathlib.Path) -> PairedSpread | None:
    """The spread from seed to seed of held-out loss over the baseline's, from the rows in `out`; None of too few."""
    losses: dict[str, dict[int, list[float]]] = {variant: {} for variant in sweep.variants}
    for run in runs:
        if loss := _loss(out / run.folder / "record.json"):
            losses[run.variant].setdefault(run.seed, []).append(math.log(loss))
    means = {
        variant: {seed: averages.fmean(logs) for seed, logs in by_seed.items()} for variant, by_seed in losses.items()
    }
    baseline = means.pop(sweep.baseline)
    return statistics.paired_spread(
        [[mean - baseline[seed] for seed, mean in by_seed.items() if seed in baseline] for by_seed in means.values()]
    )


def _loss(file):
    """The held-out loss of a run that ended well, or None."""
    try:
        row = read_record(file)
    except UserError:
        return None
    loss = row["quality"].get("eval_loss")
    return loss if row["outcome"] == "ok" and loss is not None and loss > 0 else None


def describe_power(sweep: Sweep, runs: Sequence[Run], out: pathlib.Path | None = None) -> str:
    """Describes what the seeds of a sweep can tell: two-sided 5 %, power 80 %, paired by seed, Student's t."""
    spread = measure_spread(sweep, runs, out) if out else None
    if spread is None:
        spread, source = USUAL, "of 24-step runs of experiments/, until two seeds of a variant have rows here"
    else:
        source = f"of the rows here, {spread.degrees} degrees of freedom"
    count, tells = len(sweep.seeds), "one seed tells none"
    if count > 1:
        tells = f"{count} seeds tell {statistics.smallest_effect(spread.value, count):.2%}"
    needed = statistics.blocks_needed(spread.value, EFFECT, MOST)
    more = "more than " if needed == MOST else ""
    return (
        f"held-out loss: {tells} (two-sided 5 %, power {statistics.POWER:.0%}, paired by seed), {EFFECT:.0%} needs "
        f"{more}{needed} seeds: a ratio to {sweep.baseline} varies by {spread.value:.2%} from seed to seed ({source})"
    )
