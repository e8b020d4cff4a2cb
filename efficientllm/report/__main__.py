"""Compares rows: writes a report of many runs, or says whether one regressed against another.

  python -m efficientllm.report RUNS... --out=DIR [--baseline=VARIANT]
  python -m efficientllm.report --compare A B [--metric=NAME,...] [--margin=0.02]

  RUNS, A, B            a record.json, a run's folder, a folder of runs (such as a sweep's), or a file *.rows.jsonl
  --out=DIR             where index.html, report.md, rows.csv, leaderboard.json and figures/ are written
  --baseline=VARIANT    the reference of all comparisons: a variant, its config's name, or values of its config
                        such as model.mixer=gqa (default: the sweep's, else the run that started first)
  --compare             tells whether B is worse than A: the 95 % interval of B/A lies on the worse side of equal.
                        Of one run a side the values are shown, and what is exact is judged: an interval needs two
  --metric=NAME,...     the metrics that --compare looks at (default: time, energy, memory and held-out loss)
  --margin=SHARE        how far an interval may reach on either side and still be equal

Exit status: 0 ok or no regression, 1 B regressed, 2 bad input or rows that may not be compared, 3 undecided.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from efficientllm.errors import UserError, did_you_mean
from efficientllm.runtime import console
from efficientllm.runtime.stopping import stoppable

EXTRA = ("scipy", "matplotlib", "plotly", "tensorboard")
FLAGS = ("--out", "--baseline", "--compare", "--metric", "--margin", "--help")


@stoppable
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` and returns the exit status."""
    console.print_all_letters()
    argv = sys.argv[1:] if argv is None else argv
    if not argv or any(argument in ("-h", "--help") for argument in argv):
        print(__doc__.strip())
        return 0 if argv else 2
    try:
        options = parse(argv)
        return _print_comparison(options) if options.compare else _write_report(options)
    except UserError as error:
        print(f"efficientllm: {error}", file=sys.stderr)
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] not in EXTRA:
            raise
        print(f"efficientllm: {error.name} is not installed: pip install -e '.[report]'", file=sys.stderr)
    return 2


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of a command line. Raises UserError."""
    for argument in argv:
        name = argument.partition("=")[0]
        if name.startswith("-") and name not in FLAGS:
            raise UserError(f"no flag {name}; flags: {', '.join(FLAGS)}{did_you_mean(name, FLAGS)}")
    parser = console.Parser("efficientllm.report")
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--out")
    parser.add_argument("--baseline")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--metric", default="")
    parser.add_argument("--margin", type=float, default=0.02)
    options = parser.parse_args(argv)
    options.metrics = [metric for metric in options.metric.split(",") if metric]
    _check(options)
    return options


def _check(options):
    if options.compare and len(options.runs) != 2:
        raise UserError(f"--compare takes two folders or rows, A and B, not {len(options.runs)}")
    if options.compare and not 0 <= options.margin < 1:
        raise UserError(f"--margin={options.margin}: a share from 0 to 1, such as 0.02")
    if not options.compare and not options.runs:
        raise UserError("no runs given; give a record.json, a run's folder or a folder of runs")
    if not options.compare and not options.out:
        raise UserError("--out=DIR is missing; for example --out=report")


def _print_comparison(options):
    """Prints the comparison of B with A; returns 0 for no regression, 1 for a regression, 3 without a verdict."""
    from efficientllm.report import find_rows
    from efficientllm.report.regression import compare_runs

    collections = [find_rows.collect_rows([path]) for path in options.runs]
    lines, status = compare_runs(*(collection.rows for collection in collections), options.metrics, options.margin)
    for collection in collections:
        _print_left_out(collection)
    print("\n".join(lines))
    return status


def _write_report(options):
    """Writes the report's files and prints their folder."""
    from efficientllm.report import find_rows, grid_searches

    collection = find_rows.collect_rows(options.runs)
    _check_baseline(options.baseline, collection.rows)
    from efficientllm.report import leaderboard, write_files

    board = leaderboard.build_leaderboard(collection.rows, collection.orphans, options.baseline)
    board |= {"grids": grid_searches.read_grids(options.runs), "left_out": collection.left_out}
    try:
        write_files.write_report(board, collection.rows, _folder(options.out))
    except OSError as error:
        raise UserError(f"--out={options.out} cannot be written: {error.strerror}: {error.filename}") from None
    _print_left_out(collection)
    groups = board["groups"]
    count = sum(len(group["variants"]) for group in groups)
    print(f"rows {len(collection.rows)}, variants {count}, rankings {len(groups)}, failed {len(board['failures'])}")
    print(f"report: {pathlib.Path(options.out) / 'index.html'}")
    return 0


def _check_baseline(baseline, rows):
    variants = sorted({row.variant for row in rows})
    if baseline and baseline not in variants and not any(row.fits(baseline) for row in rows):
        near = did_you_mean(baseline, variants)
        raise UserError(f"--baseline={baseline}: no such variant{near}; variants: {', '.join(variants)}")


def _print_left_out(collection):
    for line in collection.left_out:
        print(line, file=sys.stderr)


def _folder(path):
    folder = pathlib.Path(path)
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={path} cannot be written: {error.strerror}") from None
    return folder


if __name__ == "__main__":
    sys.exit(main())
