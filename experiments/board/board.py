"""The board: all measured rows, the planned ones beside them, answers and verdicts, as one page and its tables.

    python experiments/board/board.py [--rows=FOLDER] [--out=FOLDER]

`--rows` holds the rows files of the sweeps (default: rows/ here). Writes index.html, leaderboard.json, rows.csv,
report.md and figures/ into `--out` (default: this folder). Exit status: 0, 1 if the page has more than MOST bytes, 2
for bad input.
"""

import argparse
import csv
import json
import os
import pathlib
import sys
import typing

from efficientllm.errors import UserError
from efficientllm.record.row import wall_seconds
from efficientllm.report import (
    answers,
    find_rows,
    grid_searches,
    leaderboard,
    pairwise,
    techniques,
    variant_names,
    write_files,
)
from efficientllm.report.joined_sweeps import is_length

HERE = pathlib.Path(__file__).parent
MOST = 5_000_000  # bytes of the page
WORKLOAD = ("data", "train.batch_size", "train.length")  # keys that are no technique
QUESTIONS = (
    answers.Question(
        "Which attention for 4k contexts on a small machine?",
        "pretrain",
        "^board_context",
        "least al_s with eval_loss <= +1 %",
        supply="experiments/board/pretrain.py:context with costs.py:context",
    ),
    answers.Question(
        "Which adapter at rank 16?",
        "tune",
        "^board_tune_(?!ranks)",
        "least eval_loss",
        supply="experiments/board/tune.py",
        variants="^(?!full|freeze|untuned)",
    ),
    answers.Question(
        "Which form for SmolLM2 under 100 MB?",
        "infer",
        "^board_infer_(topics|sources|answers)",
        "least eval_loss with resident_weight_bytes <= 100 MB",
        supply="experiments/board/infer.py",
    ),
)
PLANS = ("plan/rows.csv", "generators/plans.csv", "vision_language/plans.csv", "dit/plans.csv")
# Columns of the plans that the board shows, where a file has them.
SHOWN = ("plan", "devices", "source", "batch", "parameters", "peak_gb", "fits", "fits_with", "compute_ms", "memory_ms")
SHOWN += ("network_ms", "bound", "ttft_ms", "tpot_ms", "study_amu_gb")


def read_plans() -> list[dict[str, typing.Any]]:
    """Reads the planned rows of the other experiments -> a table for each file: `source`, `heads`, `rows`."""
    tables = []
    for name in PLANS:
        with open(HERE.parent / name, encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        heads = [head for head in SHOWN if head in lines[0]]
        tables.append(
            {
                "source": f"experiments/{name}",
                "heads": [head.replace("_", " ") for head in heads],
                "rows": [[line[head] for head in heads] for line in lines],
            }
        )
    return tables


def measured_pairs(rows: typing.Iterable[typing.Any]) -> set[tuple]:
    """The pairs of a model and a technique that rows measured well: `(task, model, its config)`.

    Runs that differ in their text, the tokens of a step, the learning rate or the seed are of one pair.
    """
    pairs = set()
    for row in rows:
        if row.ok and not row.predicted:
            config = variant_names.compared_config(row.config)
            technique = {key: value for key, value in config.items() if not (is_length(key) or key in WORKLOAD)}
            used = techniques.techniques(row)
            pairs.add((row.kind, used["model"] or used["scale"], json.dumps(technique, sort_keys=True)))
    return pairs


def state_facts(rows, files, planned, counts) -> list[str]:
    """Sentences on what was measured and planned, the machine time, and the share of comparisons that are told."""
    of_files = [row for file in files for row in find_rows.read_rows_file(file)[0]]  # trials of grids too
    runs = {find_rows.run_of(row): row for row in of_files}.values()  # a trial may stand in a block too
    seconds = [wall_seconds(row.record) or 0.0 for row in runs]
    devices = sorted({leaderboard.groups.device(row) for row in of_files if row.ok})
    trials = sum(bool(row.sweep.get(find_rows.GRID)) for row in of_files)
    return [
        f"{len(measured_pairs(rows))} measured pairs of a model and a technique, from {len(rows)} rows; "
        f"{sum(len(table['rows']) for table in planned)} planned ones, which share no ranking with them.",
        f"Machine time: {sum(seconds) / 3600:.1f} hours on {'; '.join(devices) or 'no device'}, of {len(runs)} "
        f"runs, {trials} of them trials by which sweeps chose a value.",
        pairwise.format_share(counts),
    ]


def build(folder: pathlib.Path) -> tuple[dict[str, typing.Any], list]:
    """The leaderboard of the rows files in a folder, with answers, facts and plans -> `(board, rows)`."""
    folder = pathlib.Path(os.path.relpath(folder))  # paths of rows are the same on every machine
    files, planned = find_rows.find_rows_files(folder), read_plans()
    collection = find_rows.collect_rows(files or [folder])
    board = leaderboard.build_leaderboard(collection.rows)
    board |= {
        "grids": grid_searches.read_grids(files),
        "left_out": collection.left_out,
        "answers": answers.answer_questions(QUESTIONS, board),
        "facts": state_facts(collection.rows, files, planned, board["pairwise"]),
        "planned": planned,
    }
    return board, collection.rows


def main(argv: typing.Sequence[str]) -> int:
    """Runs the command line `argv` and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=pathlib.Path, default=HERE / "rows")
    parser.add_argument("--out", type=pathlib.Path, default=HERE)
    options = parser.parse_args(argv)
    try:
        board, rows = build(options.rows)
    except UserError as error:
        print(f"efficientllm: {error}", file=sys.stderr)
        return 2
    (options.out / "figures").mkdir(parents=True, exist_ok=True)
    write_files.write_report(board, rows, options.out)
    size = (options.out / "index.html").stat().st_size
    for entry in board["answers"]:
        print(
            entry["asked"],
            *(answer["text"] for answer in entry["answers"] if answer["text"]),
            entry["missing"],
            sep="\n  ",
        )
    print("\n".join([*board["facts"], *board["left_out"]]))
    print(f"{options.out / 'index.html'}: {size / 1e6:.2f} MB")
    return 0 if size <= MOST else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
