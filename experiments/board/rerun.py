"""Reruns rows' commands in short form, and checks that they make rows of the same variant.

    python experiments/board/rerun.py [--rows=FOLDER] [--count=3] [--steps=2]

`--count` rows are taken from the rows files, of as many variants as there are, evenly spaced. Exit status:
0, 1 if a row differs.
"""

import argparse
import pathlib
import shlex
import subprocess
import sys
import tempfile
import typing

from efficientllm.errors import UserError
from efficientllm.report import find_rows, joined_sweeps, rerun_command, rows

HERE = pathlib.Path(__file__).parent


def choose_rows(folder: pathlib.Path, count: int) -> list[rows.Row]:
    """`count` rows that ended well, of as many variants as there are, evenly spaced."""
    collected = [row for row in find_rows.collect_rows([folder]).rows if row.ok]
    variants = list({(row.sweep.get("name"), row.variant): row for row in collected}.values())
    if len(variants) < count:
        return [*variants, *(row for row in collected if row not in variants)][:count]
    return [variants[i * len(variants) // count] for i in range(count)]


def short_command(row: rows.Row, steps: int, workdir: str) -> list[str]:
    """The command of a row with few steps, one batch of evaluation, and no more requests than one."""
    command = shlex.split(rerun_command.rerun_command(row))
    lengths = {"train.steps": steps, "eval.batches": 1, "checkpoint.every": 0, "checkpoint.keep": 0, "infer.repeats": 1}
    lengths |= {"infer.max_new_tokens": 2, "infer.prompt_length": 16, "infer.batch_size": 1}
    flags = [f"--config.{key}={value}" for key, value in lengths.items()]
    return [sys.executable, *command[1:], *flags, f"--workdir={workdir}"]


def difference(row: rows.Row, again: rows.Row) -> list[str]:
    """The keys, but those of length, in which the config of a rerun differs from the row's."""
    return [key for key in rows.differing(row, again) if not joined_sweeps.is_length(key)]


def main(argv: typing.Sequence[str]) -> int:
    """Runs the command line `argv` and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=pathlib.Path, default=HERE / "rows")
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args(argv)
    try:
        chosen = choose_rows(options.rows, options.count)
    except UserError as error:
        print(f"efficientllm: {error}", file=sys.stderr)
        return 2
    status = 0
    for row in chosen:
        with tempfile.TemporaryDirectory() as workdir:
            command = short_command(row, options.steps, workdir)
            done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent.parent)
            if done.returncode:
                verdict = f"ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"
            else:
                differing = difference(row, rows.read_row(pathlib.Path(workdir) / "record.json"))
                verdict = f"differs in {', '.join(differing)}" if differing else "the same variant"
        status |= verdict != "the same variant"
        print(f"{row.sweep.get('name') or row.task} {row.variant}: {verdict}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
