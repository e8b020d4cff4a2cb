"""Time of a training step and of a sampling step of a DiT, with diffusers + torch and with efficientllm.

  python third_party/diffusers/compare.py --shape=small --batch=16 --steps=10

Each contestant has a process of its own, so that thread pools and allocators are not shared. Only one works at a time.
A block is one step of each, in random order. Ratios are of medians over blocks, with a 95 % bootstrap interval. The
first losses must agree before anything is timed.
"""

import argparse
import functools
import json
import os
import pathlib
import platform
import statistics
import sys
import time

import work

from efficientllm.errors import exit_with
from efficientllm.metrics import race
from efficientllm.runtime import malloc

TOLERANCE = 1e-4  # of the first loss between float32 contestants, relative
BASELINES = {"float32": "torch-float32", "16 bits": "torch-bfloat16"}
DEFAULT = "torch-float32,ours-float32,torch-bfloat16,ours-mixed,ours-bfloat16"
QUESTIONS = {"step": "training step", "forward": "sampling step"}


def main(argv=None):
    options = _options(argv)
    load = os.getloadavg()[0]
    names = options.contestants.split(",")
    settings = {name: malloc.settings() for name in names if name.startswith("ours")}  # as efficientllm.main
    contestants = {name: race.Process(_trainer, name, options, environment=settings.get(name)) for name in names}
    try:
        losses = {name: contestant.ask("loss") for name, contestant in contestants.items()}
        difference = check_first_losses(losses)
        times = {question: measure(contestants, question, options.steps) for question in QUESTIONS}
        versions = {key: value for c in contestants.values() for key, value in c.ask("versions").items()}
    finally:
        for contestant in contestants.values():
            contestant.close()
    report = {
        "shape": options.shape,
        "batch": options.batch,
        "threads": options.threads,
        "first_losses": losses,
        "first_loss_difference": difference,
        "seconds": times,
        "speed_ratios": {question: ratios(seconds) for question, seconds in times.items()},
        "load_before": load,
        "provenance": versions | provenance(),
    }
    print(table(report))
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(report, indent=1) + "\n")


def _options(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=work.SHAPES, default="small")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each contestant")
    parser.add_argument("--batch", type=int, default=16, help="pictures per step")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="cores and threads per contestant")
    parser.add_argument("--contestants", default=DEFAULT, help="default: %(default)s")
    parser.add_argument("--json", help="file for every number")
    return parser.parse_args(argv)


def _trainer(name, options):
    """Builds a contestant in its process: a function of a question and its arguments."""
    if hasattr(os, "sched_setaffinity"):  # both libraries size their thread pools by the allowed cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.threads :])
    side, precision = name.split("-")
    shape = work.SHAPES[options.shape]
    if side == "torch":
        import peer as module

        trainer = module.Trainer(shape, precision, options.threads)
    else:
        import ours as module

        trainer = module.Trainer(shape, precision)

    def timed(call, step):
        batch = work.batch(shape, options.batch, step)
        begin = time.perf_counter()
        call(batch)
        return time.perf_counter() - begin

    answers = {
        "loss": lambda: trainer.step(work.batch(shape, options.batch, 0)),
        "step": functools.partial(timed, trainer.step),
        "forward": functools.partial(timed, trainer.forward),
        "versions": module.versions,
    }
    return lambda question, *details: answers[question](*details)


def check_first_losses(losses):
    """Largest relative difference of the float32 contestants' first losses. Raises RuntimeError beyond TOLERANCE."""
    exact = [loss for name, loss in losses.items() if "float32" in name]
    difference = max(exact, default=0.0) / min(exact, default=1.0) - 1 if exact else 0.0
    if difference > TOLERANCE:
        raise RuntimeError(f"the first losses differ by {difference:.2e}: {losses}")
    return difference


def measure(contestants, question, steps):
    """Runs the race of a question: `{name: seconds of the counted blocks}`."""

    def asked(process, block):
        return process.ask(question, block + 1)

    def note(block, seconds):
        shown = ", ".join(f"{name} {value:.3f} s" for name, value in seconds.items())
        print(f"{QUESTIONS[question]} {block + 1}: {shown}", file=sys.stderr)

    steppers = {name: functools.partial(asked, process) for name, process in contestants.items()}
    return race.race(steppers, steps, discarded=2, after_block=note)


def ratios(seconds):
    """`{name: its speed over torch's of the same bits}`; empty for baselines that do not take part."""
    speeds = {}
    for name in seconds:
        baseline = BASELINES["float32" if name.endswith("float32") else "16 bits"]
        if baseline in seconds:
            speeds[name] = race.ratio_of_medians(seconds[baseline], seconds[name])._asdict()
    return speeds


def provenance():
    """Date, commit and machine of the measurement."""
    from efficientllm.record.provenance import git_state, processor

    host, commit = processor(), git_state(pathlib.Path(__file__).parent)["commit"]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit and commit[:7],
        "cpu": host["name"],
        "cores": host["cores"],
        "python": platform.python_version(),
    }


def table(report):
    """Formats the report as text."""
    origin = report["provenance"]
    lines = [
        f"{report['shape']}, {report['batch']} pictures a step, {origin['cpu']}, {origin['cores']} cores, load "
        f"{report['load_before']}",
        f"first losses agree to {report['first_loss_difference']:.1e}",
    ]
    for question, name_of_question in QUESTIONS.items():
        lines += ["", f"{name_of_question:20}{'s':>9}{'pictures/s':>12}   speed over torch of as many bits"]
        for name, seconds in report["seconds"][question].items():
            median = statistics.median(seconds)
            ratio = report["speed_ratios"][question].get(name)
            shown = "" if ratio is None else f"   {race.Ratio(**ratio)}"
            lines.append(f"{name:20}{median:9.3f}{report['batch'] / median:12.1f}{shown}")
    return "\n".join(lines)


if __name__ == "__main__":
    exit_with(main)
