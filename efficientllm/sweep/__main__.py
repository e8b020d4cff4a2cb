"""Runs every variant of a sweep in fresh processes, in randomised blocks, and reports.

  python -m efficientllm.sweep --config=FILE [--config.key=value ...] [--out=DIR] [--rows=FILE] [--dry_run]
                               [--only=mla,nsa] [--retry=oom,crash] [--launcher=local|slurm] [--partition=NAME]

  --config=FILE[:ARG]   a Python file whose get_config(), or get_config(ARG), returns an efficientllm.sweep.Sweep
  --config.key=value    replaces one value in every run: --config.model.size=1.5b
  --out=DIR             where runs and report go (default: runs/sweeps/<name>)
  --rows=FILE           a file NAME.rows.jsonl (or .rows.jsonl.gz) to commit: runs whose rows it holds are not repeated,
                        on any machine (their rows are restored in DIR), and rows join it as runs end
  --only=LIST           these variants and the baseline; a command without it goes on with the others
  --dry_run             prints every run with its estimated cost, and runs nothing
  --retry=LIST          reruns the runs whose outcome is in the list: oom, crash, error, nan, timeout, invalid
  --launcher            local: one after another; slurm: one job array, a run an allocation
  --partition           Slurm's partition

The same command resumes an interrupted sweep; runs that have a row are not repeated.
Exit status: 0 all runs are ok, 1 some failed (their rows say how), 2 bad input, 130 stopped.
"""

import contextlib
import functools
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from efficientllm.errors import UserError, did_you_mean
from efficientllm.runtime import console, optional_packages

STOPPED = 130
FLAGS = ("config", "out", "rows", "dry_run", "only", "retry", "launcher", "partition")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` and returns the exit status."""
    console.print_all_letters()
    argv = sys.argv[1:] if argv is None else argv
    if not argv or {"-h", "--help"} & set(argv):
        print(__doc__.strip())
        return 0 if argv else 2
    try:
        flags, extra = _parse(argv)
        with stoppable():
            return _main(flags, extra)
    except UserError as error:
        print(f"efficientllm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # between two runs
        print("stopped; the same command goes on")
        return STOPPED


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Handles SIGTERM like Ctrl-C: the current run is told to stop, saves, and is waited for."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parse(argv):
    flags, extra = {}, []
    for argument in argv:
        name, _, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--config."):
            extra.append(argument)
        elif argument.startswith("--") and name in FLAGS:
            flags[name] = _flag(argument, name, value)
        else:
            raise UserError(f"no flag {argument!r}; flags: --{', --'.join(FLAGS)}{did_you_mean(name, FLAGS)}")
    if "config" not in flags:
        raise UserError("--config=FILE is missing; for example --config=experiments/attention/sweep.py")
    return flags, tuple(extra)


def _flag(argument, name, value):
    """The value of a flag. Raises UserError for a switch with a value, or a flag without one."""
    from efficientllm.config import path_rules

    if name == "dry_run":
        if "=" in argument:
            raise UserError(f"{argument}: is a switch, without a value; leave it out to run")
        return "true"
    if not value:
        raise UserError(f"--{name} needs a value: --{name}=...")
    if name in ("config", "out", "rows"):
        path_rules.check_path(f"--{name}", value)
    return value


def _main(flags, extra):
    from efficientllm.record import rows_file
    from efficientllm.sweep import cost_estimates, grid, launch, spec

    retry = _retry(flags.get("retry"))
    launch.check_launcher(flags.get("launcher", "local"))
    whole = spec.load_sweep(flags["config"])
    sweep = spec.keep_variants(whole, flags["only"]) if "only" in flags else whole
    out = pathlib.Path(flags.get("out") or pathlib.Path("runs/sweeps") / sweep.name)
    if rows := flags.get("rows"):
        rows_file.check_name("--rows", rows)
        print(f"{rows_file.restore_rows(rows, out)} rows of {rows} restored in {out}")
    costs = cost_estimates.estimate_costs(sweep, extra)
    chosen = grid.choose_values(sweep, out, extra) if grid.is_finished(sweep, out, extra) else None
    list_runs = functools.partial(spec.list_runs, whole, extra, only=sweep.variants)
    runs = [] if sweep.search else list(list_runs(chosen))
    if chosen:
        grid.take_over_trials(sweep, out, runs, extra)
    print(cost_estimates.format_costs(sweep, costs, runs, out, extra))
    if "dry_run" in flags:
        return 0
    save_rows = functools.partial(rows_file.pack_rows, out, rows) if rows else lambda: None
    try:
        if sweep.search:
            return _search(sweep, flags, extra, out, retry)
        return _run(sweep, list_runs, flags, extra, out, retry, costs, save_rows)
    finally:
        save_rows()


def _run(sweep, list_runs, flags, extra, out, retry, costs, save_rows):
    """Runs the grid search and the blocks -> the exit status."""
    from efficientllm.sweep import execute, grid, launch

    launcher = launch.open_launcher(flags.get("launcher", "local"), out, flags.get("partition"), save_rows)
    began = time.time()

    def run_all(runs, out):
        for run in runs:
            execute.update_place(run, out / run.folder)
            if execute.read_outcome(out / run.folder) in retry:
                execute.set_row_aside(out / run.folder)
        return launcher(runs, out, sweep, costs)

    runs = list(list_runs())
    if sweep.grid and run_all(list(grid.list_tries(sweep, extra)), out / grid.FOLDER) is not None:
        runs = list(list_runs(grid.choose_values(sweep, out, extra)))
        grid.take_over_trials(sweep, out, runs, extra)
        print(grid.format_choices(sweep, out))
    elif sweep.grid:
        return _stopped(began)
    outcomes = run_all(runs, out)
    if outcomes is None:
        return _stopped(began)
    _report(out)
    failed = {run.folder: ended_as for run, ended_as in zip(runs, outcomes, strict=True) if ended_as != "ok"}
    for folder, ended_as in failed.items():
        print(f"{ended_as:10} {out / folder}: {execute.last_message(out / folder)}")
    return 1 if failed else 0


def _stopped(began):
    print(f"stopped after {time.time() - began:.0f} s; the same command goes on")
    return STOPPED


def _search(sweep, flags, extra, out, retry):
    from efficientllm.sweep import search

    if flags.get("launcher", "local") != "local":
        raise UserError(f"--launcher={flags['launcher']}: a search asks one run after another: --launcher=local")
    results = search.search_all(sweep, out, extra, retry)
    if results is None:
        print("stopped; the same command goes on")
        return STOPPED
    print(search.format_results(sweep, results))
    return 0 if all(result.largest for result in results.values()) else 1


def _retry(text):
    from efficientllm.record.row import OUTCOMES

    names = tuple(text.split(",")) if text else ()
    for name in names:
        if name not in OUTCOMES or name == "ok":
            retryable = [outcome for outcome in OUTCOMES if outcome != "ok"]
            raise UserError(
                f"--retry={text}: {name!r} is none of {', '.join(retryable)}{did_you_mean(name, retryable)}"
            )
    return names


def _report(out):
    """Writes the report, in its own process: it needs the extra `report`."""
    done = subprocess.run([sys.executable, "-m", "efficientllm.report", str(out), f"--out={out / 'report'}"])
    if done.returncode:
        remedy = optional_packages.remedy("report")
        print(f"no report: {remedy}, then python -m efficientllm.report {out} --out={out}/report")


if __name__ == "__main__":
    sys.exit(main())
