"""Grid search before a comparison: each variant gets the value of one key with the least held-out loss.

Every trial is a run with a row, in the folder `grid`, which reports leave out of their rankings. `grid.json` and the
report state what the trials cost.
"""

import json
import pathlib
from collections.abc import Iterator, Sequence

from efficientllm.record.row import read_record, write_record
from efficientllm.runtime.atomic_write import write_atomically
from efficientllm.sweep import execute, spec
from efficientllm.untrusted import json_text

FOLDER = "grid"


def list_tries(sweep: spec.Sweep, extra: Sequence[str] = ()) -> Iterator[spec.Run]:
    """Lists a run of every variant with every value, at the first seed."""
    key, values = sweep.grid
    for order, value in enumerate(values):
        for variant in sweep.variants:
            flag, seed = _flag(key, value), sweep.seeds[0]
            argv = (*spec.argv_of(sweep, variant, extra), flag, f"--config.seed={seed}")
            yield spec.Run(
                sweep.name, variant, sweep.baseline, 0, order, seed, argv, grid=flag, measures=sweep.measures
            )


def is_finished(sweep: spec.Sweep, out: pathlib.Path, extra: Sequence[str] = ()) -> bool:
    """Whether the sweep has a grid, and every trial of it a row."""
    tries = list_tries(sweep, extra) if sweep.grid else ()
    return bool(sweep.grid) and all(execute.read_outcome(out / FOLDER / run.folder) for run in tries)


def choose_values(sweep: spec.Sweep, out: pathlib.Path, extra: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """Chooses `{variant: flags}` from the rows of the trials; writes `grid.json` into `out`.

    A variant without a successful trial has no flags: it runs unchanged.
    """
    key, values = sweep.grid
    tries: dict[str, list[dict]] = {variant: [] for variant in sweep.variants}
    for run in list_tries(sweep, extra):
        tries[run.variant].append({"value": values[run.order], **_read_trial(out / FOLDER / run.folder)})
    best = {variant: _best(trials) for variant, trials in tries.items()}
    text = {variant: {"chosen": best[variant], "tries": trials} for variant, trials in tries.items()}
    write_atomically(out / "grid.json", json.dumps({"sweep": sweep.name, "key": key, "variants": text}, indent=2))
    return {variant: () if value is None else (_flag(key, value),) for variant, value in best.items()}


def take_over_trials(sweep: spec.Sweep, out: pathlib.Path, runs: Sequence[spec.Run], extra: Sequence[str] = ()) -> None:
    """Gives each run without a row, of a sweep for quality, the row of the trial with its command line.

    Repeated, it would have the same losses. Its times are not those of its place in a block, so that other sweeps
    repeat it.
    """
    if sweep.measures != "quality" or not sweep.grid:
        return
    trials = {(trial.variant, trial.argv): out / FOLDER / trial.folder for trial in list_tries(sweep, extra)}
    for run in runs:
        trial = trials.pop((run.variant, run.argv), None)  # of two runs with one command line the first
        folder = out / run.folder
        if trial and execute.read_outcome(trial) == "ok" and execute.read_outcome(folder) is None:
            folder.mkdir(parents=True, exist_ok=True)
            write_record(read_record(trial / "record.json") | {"sweep": run.place}, folder / "record.json")


def format_choices(sweep: spec.Sweep, out: pathlib.Path) -> str:
    """Formats the chosen values and the cost of the trials."""
    choices = json_text.read(out / "grid.json")
    lines = [f"{'variant':24}{'held-out loss':>14}{'tries':>7}{'cost':>9}{'J':>11}  chosen {choices['key']}"]
    for variant, choice in choices["variants"].items():
        tries = choice["tries"]
        loss = min((t["eval_loss"] for t in tries if t["eval_loss"] is not None), default=float("nan"))
        seconds, joules = (_sum(tries, key) for key in ("seconds", "energy_j"))
        cost = f"{len(tries):7}{'-' if seconds is None else f'{seconds:.0f} s':>9}"
        cost += f"{'-' if joules is None else f'{joules:.4g}':>11}"
        lines.append(f"{variant:24}{loss:14.4f}{cost}  {choice['chosen'] or 'its own: no try ended well'}")
    return "\n".join(lines)


def _sum(tries, key):
    """Sum over the trials that have the value; None if none has it."""
    numbers = [trial[key] for trial in tries if trial[key] is not None]
    return sum(numbers) if numbers else None


def _flag(key, value):
    return f"--config.{key}={value}"


def _read_trial(folder):
    """Reads a trial's row: outcome, held-out loss, wall time in s, energy in J."""
    row = read_record(folder / "record.json")
    loss = row["quality"].get("eval_loss") if execute.read_outcome(folder) == "ok" else None
    return {
        "outcome": row["outcome"],
        "eval_loss": loss,
        "seconds": execute.run_seconds(folder),
        "energy_j": row["physical"].get("energy_j"),
    }


def _best(tries):
    successful = [trial for trial in tries if trial["eval_loss"] is not None]
    return min(successful, key=lambda trial: trial["eval_loss"])["value"] if successful else None
