"""What each variant is run with, chosen before it is compared: the value of one key with the least held-out loss.

Every try is a run of its own with a row of its own, in the folder `grid`, which reports leave out of their rankings;
what the tries cost stands in `grid.json` and in the report.
"""

import json

from efficientllm.record.row import read_record
from efficientllm.runtime.atomic_write import write_atomically
from efficientllm.sweep import execute, spec
from efficientllm.untrusted import json_text

FOLDER = "grid"


def runs(sweep, extra=()):
    """A run of every variant with every value, at the first seed."""
    key, values = sweep.grid
    for order, value in enumerate(values):
        for variant in sweep.variants:
            flag, seed = _flag(key, value), sweep.seeds[0]
            argv = (*spec.argv_of(sweep, variant, extra), flag, f"--config.seed={seed}")
            yield spec.Run(sweep.name, variant, sweep.baseline, 0, order, seed, argv, grid=flag)


def choose(sweep, out, extra=()):
    """`{variant: flags}` from the rows of the tries, also written to `grid.json` in `out`.

    A variant of which no try ended well has no flags: it runs as it stands.
    """
    key, values = sweep.grid
    tries = {variant: [] for variant in sweep.variants}
    for run in runs(sweep, extra):
        tries[run.variant].append({"value": values[run.order], **_found(out / FOLDER / run.folder)})
    best = {variant: _best(found) for variant, found in tries.items()}
    text = {variant: {"chosen": best[variant], "tries": found} for variant, found in tries.items()}
    write_atomically(out / "grid.json", json.dumps({"sweep": sweep.name, "key": key, "variants": text}, indent=2))
    return {variant: () if value is None else (_flag(key, value),) for variant, value in best.items()}


def table(sweep, out):
    """What was chosen and what the tries cost, as text."""
    found = json_text.read(out / "grid.json")
    lines = [f"{'variant':24}{'held-out loss':>14}{'tries':>7}{'cost':>9}{'J':>11}  chosen {found['key']}"]
    for variant, each in found["variants"].items():
        tries = each["tries"]
        loss = min((t["eval_loss"] for t in tries if t["eval_loss"] is not None), default=float("nan"))
        seconds, joules = (_sum(tries, key) for key in ("seconds", "energy_j"))
        cost = f"{len(tries):7}{'-' if seconds is None else f'{seconds:.0f} s':>9}"
        cost += f"{'-' if joules is None else f'{joules:.4g}':>11}"
        lines.append(f"{variant:24}{loss:14.4f}{cost}  {each['chosen'] or 'its own: no try ended well'}")
    return "\n".join(lines)


def _sum(tries, key):
    """Over the tries that know it; None where none does."""
    known = [each[key] for each in tries if each[key] is not None]
    return sum(known) if known else None


def _flag(key, value):
    return f"--config.{key}={value}"


def _found(folder):
    """What a try's row says: outcome, held-out loss, wall time in s, energy in J."""
    row = read_record(folder / "record.json")
    loss = row["quality"].get("eval_loss") if execute.outcome(folder) == "ok" else None
    return {
        "outcome": row["outcome"],
        "eval_loss": loss,
        "seconds": execute.seconds(folder),
        "energy_j": row["physical"].get("energy_j"),
    }


def _best(tries):
    ended = [each for each in tries if each["eval_loss"] is not None]
    return min(ended, key=lambda each: each["eval_loss"])["value"] if ended else None
