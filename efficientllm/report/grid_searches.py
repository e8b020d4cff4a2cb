"""Grid searches of sweeps, from grid.json beside the runs or from the trials in a rows file."""

import collections
import os
import pathlib
import typing
from collections.abc import Iterable

from efficientllm.errors import UserError
from efficientllm.record.row import wall_seconds
from efficientllm.report import find_rows
from efficientllm.untrusted import json_text

Grid = dict[str, typing.Any]  # the content of a grid.json, see `sweep.grid`


def read_grids(paths: Iterable[str | os.PathLike[str]]) -> list[Grid]:
    """Reads the grid searches of all sweeps below the paths; what is no grid search is skipped."""
    grids: list[Grid] = []
    for path in map(pathlib.Path, paths):
        for file in find_rows.files_below(path, "grid.json") if path.is_dir() else ():
            try:
                grid = json_text.read(file)
            except UserError:
                continue
            if _is_grid(grid):
                grids.append(grid)
        for file in find_rows.find_rows_files(path):
            grids += grids_of_rows(find_rows.read_rows_file(file)[0])
    return grids


def grids_of_rows(rows: Iterable[typing.Any]) -> list[Grid]:
    """The grid searches whose trials are among these rows, in the form of grid.json."""
    tries: dict[tuple, dict] = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in rows:
        flag = row.sweep.get(find_rows.GRID)
        if isinstance(flag, str):
            key, _, value = flag.removeprefix("--config.").partition("=")
            loss = row.values.get("eval_loss") if row.ok else None
            attempt = {"value": value, "outcome": row.outcome, "eval_loss": loss, "seconds": wall_seconds(row.record)}
            tries[str(row.sweep.get("name")), key][str(row.sweep.get("variant"))].append(attempt)
    return [
        {
            "sweep": sweep,
            "key": key,
            "variants": {variant: {"chosen": _best(trials), "tries": trials} for variant, trials in variants.items()},
        }
        for (sweep, key), variants in tries.items()
    ]


def _best(trials):
    successful = [trial for trial in trials if trial["eval_loss"] is not None]
    return min(successful, key=lambda trial: trial["eval_loss"])["value"] if successful else None


def _is_grid(grid):
    """True if this is a grid.json of `sweep.grid`."""
    variants = grid.get("variants")
    if not isinstance(variants, dict) or not {"sweep", "key"} <= grid.keys():
        return False
    entries = [entry for entry in variants.values() if isinstance(entry, dict) and isinstance(entry.get("tries"), list)]
    needed = {"value", "outcome", "eval_loss", "seconds"}
    number = (int, float, type(None))
    return len(entries) == len(variants) and all(
        isinstance(attempt, dict)
        and needed <= attempt.keys()
        and all(isinstance(attempt[key], number) for key in ("eval_loss", "seconds"))
        for entry in entries
        for attempt in entry["tries"]
        if "chosen" in entry
    )
