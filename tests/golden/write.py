"""Stores what the golden cases give now, for this version of jax: python -m tests.golden.write [NAME...]

Only for a change that is meant to change results; the diff of tests/golden/data shows what it changed.
"""

import json
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from golden import cases, process


def write(names):
    """Replaces the structure of each case, and its numbers under the conditions of this machine."""
    for name, case in process.observe(names).items():
        if "failed" in case:
            print(f"{name}: NOT stored: {case['failed']}")
            continue
        numbers = process.stored(name)["numbers"]
        if case["numbers"]:
            numbers |= {process.conditions(): case["numbers"]}
        (process.FOLDER / f"{name}.json").write_text(text_of({"structure": case["structure"], "numbers": numbers}))
        print(f"{name}: stored")


def text_of(tree):
    """JSON with a path a line: lists of numbers and short names stand on one."""
    text = json.dumps(tree, indent=1, sort_keys=True)
    return re.sub(r"\[\n([^\[\]{}]*)\]", lambda inner: f"[{' '.join(inner[1].split())}]", text) + "\n"


if __name__ == "__main__":
    unknown = set(sys.argv[1:]) - set(cases.NAMES)
    if unknown:
        raise SystemExit(f"no case {', '.join(sorted(unknown))}; known: {', '.join(cases.NAMES)}")
    write(sys.argv[1:] or cases.NAMES)
