"""Says whether something has got slower: the paired comparisons of third_party in short form, drawn over time.

  python experiments/speed/run.py
  python experiments/speed/run.py --only='train|precision'
  python experiments/speed/run.py --check

Ten minutes on two idle cores. Each comparison is a row of `rows.jsonl`: the ratio of medians (above 1, ours is faster)
with its 95 % interval, the commit, the CPU and the versions. `speed.png` shows them over time. A comparison that is
more than 5 % slower than before in two runs in a row on the same kind of CPU is named.

Rows are written as soon as a race ends: after a stop the same command goes on, at the same commit and on the same CPU.
Exit status: 0, 1 for a drop on this kind of CPU (with --check, on any), 2 for a bad option, 3 if a race failed.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import re
import statistics
import sys
import time

import history
from races import RACES

from efficientllm.errors import UserError, exit_with
from efficientllm.metrics import race
from efficientllm.runtime import cpuinfo
from efficientllm.runtime.stopping import stoppable

HERE = pathlib.Path(__file__).resolve().parent
PACKAGES = ("jax", "jaxlib", "torch", "transformers", "peft", "diffusers")
DROPPED, FAILED = 1, 3


@stoppable
def main(argv=None):
    options = _options(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "rows.jsonl"
    failures = [] if options.check else list(measure(file, options))
    rows = read(file)
    if not rows:
        raise UserError(f"--out = {options.out}: holds no rows, and nothing was measured")
    history.draw(rows, options.out / "speed.png")
    print(table(rows))
    here = history.cpu_kind(describe_machine())
    drops = [drop for drop in history.find_drops(rows) if options.check or drop.kind == here]
    for drop in drops:
        print(f"slower: {drop}")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return DROPPED if drops else FAILED if failures else 0


def _options(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"regular expression: of {', '.join(RACES)}")
    parser.add_argument("--check", action="store_true", help="measure nothing: draw the rows, and look for drops")
    parser.add_argument("--blocks", type=int, help="timed blocks of each race, in place of its own number")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results", help="folder (default: %(default)s)")
    options = parser.parse_args(argv)
    options.races = {name: of_name for name, of_name in RACES.items() if re.search(options.only, name)}
    if not options.races:
        parser.error(f"--only={options.only}: no race has such a name; choose from {', '.join(RACES)}")
    return options


def read(file: pathlib.Path) -> list[history.Row]:
    """Reads the rows of a file, empty before the first run."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def measure(file, options):
    """Runs the races that the current run lacks, and appends their rows; yields those that failed."""
    origin, rows = describe_machine(), read(file)
    comparisons = {name: set(of_name.takes_part()) for name, of_name in options.races.items()}
    absent = {name: why for name, of_name in options.races.items() if (why := of_name.missing())}
    wanted = set().union(*(names for name, names in comparisons.items() if name not in absent))
    run = find_run(rows, origin, wanted)
    done = {row["comparison"] for row in rows if row["run"] == run}
    for name, of_name in options.races.items():
        for left_out in sorted(set(of_name.comparisons) - comparisons[name]):
            print(f"left out: {left_out}: this CPU has no instructions for bfloat16")
        if name in absent:
            print(f"left out: {', '.join(of_name.comparisons)}: {absent[name]}")
        elif comparisons[name] <= done:
            print(f"{name}: measured before", file=sys.stderr)
        else:
            print(f"{name}: {', '.join(sorted(comparisons[name]))}", file=sys.stderr, flush=True)
            try:
                seconds = of_name.run(options.blocks)
            except UserError as error:
                yield f"{name}: {error}"
                continue
            append(file, [make_row(run, name, of, *pair, origin) for of, pair in seconds.items()])


def find_run(rows, origin, wanted):
    """The last run, if it lacks a comparison and was of the same code on the same machine; else a new one."""
    if rows:
        last = [row for row in rows if row["run"] == rows[-1]["run"]]
        is_same = all(row[key] == origin[key] for row in last for key in ("commit", "dirty", "cpu", "versions"))
        if is_same and not wanted <= {row["comparison"] for row in last}:
            return last[0]["run"]
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def describe_machine():
    """What every row says of the code and the machine."""
    from efficientllm.record import provenance

    state, versions = provenance.git_state(HERE, without="experiments/speed/results"), {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    cpu = provenance.processor() | {"instructions": list(cpuinfo.vector_instructions())}
    return {"date": time.strftime("%Y-%m-%d"), **state, "cpu": cpu, "versions": versions}


def make_row(run, name, comparison, ours, peer, origin):
    ratio = race.ratio_of_medians(peer, ours)
    return {
        "run": run,
        **origin,
        "load": os.getloadavg()[0],
        "race": name,
        "comparison": comparison,
        **ratio._asdict(),
        "ours_s": statistics.median(ours),
        "peer_s": statistics.median(peer),
        "blocks": len(ours),
    }


def append(file, rows):
    with open(file, "a", encoding="utf-8") as lines:
        lines.write("".join(f"{json.dumps(row)}\n" for row in rows))


def table(rows):
    """Formats the latest row of each comparison on each kind of CPU."""
    lines = []
    kinds = dict.fromkeys(map(history.cpu_kind, rows))
    of_series = history.series(rows)
    for kind in kinds:
        latest = [of_kind[-1] for (_, other), of_kind in of_series.items() if other == kind]
        lines += [f"{kind}, {latest[-1]['date']}", f"{'':36}{'ours s':>10}{'other s':>10}   speed"]
        for row in latest:
            speed = race.Ratio(row["ratio"], row["low"], row["high"])
            lines.append(f"{row['comparison']:36}{row['ours_s']:10.4f}{row['peer_s']:10.4f}   {speed}")
    return "\n".join(lines)


if __name__ == "__main__":
    exit_with(main)
