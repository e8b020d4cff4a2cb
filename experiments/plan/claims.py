"""Table of the study's claims judged by plans: `python experiments/plan/claims.py [--out=DIR]`."""

import argparse
import pathlib

from efficientllm.errors import exit_with
from efficientllm.report import find_rows, groups, planned_claims, rows


def evaluate_plans(out):
    """Evaluates the claims on the plans below `out`. A plan's variant is its path."""
    plan_rows = rows.read_rows(find_rows.find_files([out])[0])
    for row in plan_rows:
        row.variant = str(row.path.parent.relative_to(out))
    return planned_claims.evaluate_plans(groups.group_rows(plan_rows))


def format_ratio(pair):
    """Formats the ratio of two plans. The folder that they share is named once."""
    (folder, of), (other, against) = (pair[key].rsplit("/", 1) for key in ("variant", "against"))
    against = against if folder == other else f"{other}/{against}"
    return f"{folder}: {of} / {against} {pair['ratio']:.3g}"


def line(claim):
    """Formats a claim as a table row: its statement, verdict and ratios."""
    ratios = "; ".join(format_ratio(pair) for pair in claim["pairs"] if "ratio" in pair)
    bound = f"{claim['metric']} ratio {claim['ratio']}"
    return f"| {claim['name']} | {claim['says']} ({claim['where']}) | {bound} | {claim['status']} | {ratios} |"


def run():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/plan"), help="what plan/run.py wrote")
    options = parser.parse_args()
    if not next(options.out.glob("**/record.json"), None):
        parser.error(f"--out={options.out} holds no plans; python experiments/plan/run.py makes them")
    print("| claim | says | checked as | here | ratios |\n|---|---|---|---|---|")
    print("\n".join(line(claim) for claim in evaluate_plans(options.out)))


if __name__ == "__main__":
    exit_with(run)
