"""Time of a training step and of a sampling step of a DiT, with diffusers + torch and with efficientllm.

  python third_party/diffusers/compare.py --shape=small --batch=16 --steps=10

Each contestant has a process of its own, so that thread pools and allocators are not shared. Only one works at a time.
A block is one step of each, in random order. Ratios are of medians over blocks, with a 95 % bootstrap interval. The
first losses and predictions must agree before anything is timed. Memory is the peak of a process's resident memory, and
what of it came after its libraries were imported: up to the first steps, with what compilation takes, and in the steps
that follow.
"""

import argparse
import functools
import importlib
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import sys
import time
import typing
from collections.abc import Callable

import work

from efficientllm.errors import exit_with
from efficientllm.metrics import host, race
from efficientllm.runtime import malloc

TOLERANCE = 1e-4  # of the first loss between float32 contestants, relative
BASELINES = {"float32": "torch-float32", "16 bits": "torch-bfloat16"}
DEFAULT = "torch-float32,ours-float32,torch-bfloat16,ours-mixed,ours-bfloat16"
QUESTIONS = {"step": "training step", "forward": "sampling step"}


def main(argv=None):
    options = _options(argv)
    finish([run(make_trainer, options.shape, options)], options)


def run(make, shape, options):
    """Runs the races of training and of sampling steps -> a report.

    `make(name, shape, options)` makes a contestant in its process, a Contestant. `shape` is what the report calls it.
    """
    load = os.getloadavg()[0]
    names = options.contestants.split(",")
    settings = {name: malloc.settings() for name in names if name.startswith("ours")}  # as efficientllm.main
    contestants = {
        name: race.Process(_answer, make, name, shape, options, environment=settings.get(name)) for name in names
    }
    try:
        samples = {name: contestant.ask("sample") for name, contestant in contestants.items()}
        losses = {name: contestant.ask("loss") for name, contestant in contestants.items()}
        differences = {"sample": difference(samples, "first samples"), "loss": difference(losses, "first losses")}
        before = {name: contestant.ask("before") for name, contestant in contestants.items()}
        peaks = {"until the first steps": {name: contestant.ask("peak") for name, contestant in contestants.items()}}
        times = {question: measure(contestants, question, options.steps) for question in QUESTIONS}
        peaks |= {"in later steps": {name: contestant.ask("peak") for name, contestant in contestants.items()}}
        versions = {key: value for c in contestants.values() for key, value in c.ask("versions").items()}
    finally:
        for contestant in contestants.values():
            contestant.close()
    return {
        "shape": shape,
        "batch": options.batch,
        "threads": options.threads,
        "first_samples": samples,
        "first_losses": losses,
        "first_differences": differences,
        "seconds": times,
        "speed_ratios": {question: ratios(seconds) for question, seconds in times.items()},
        "bytes_before": before,
        "peak_bytes": peaks,
        "load_before": load,
        "provenance": versions | provenance(),
    }


def finish(reports, options):
    """Prints reports, and writes them where `--json` says, a line each."""
    print("\n\n".join(map(table, reports)))
    if options.json:
        pathlib.Path(options.json).write_text("".join(f"{json.dumps(report)}\n" for report in reports))


def _options(argv):
    parser = options_of(__doc__)
    parser.add_argument("--shape", choices=work.SHAPES, default="small")
    return parser.parse_args(argv)


def options_of(description):
    """The parser of what all races have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each contestant")
    parser.add_argument("--batch", type=int, default=16, help="pictures per step")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="cores and threads per contestant")
    parser.add_argument("--contestants", default=DEFAULT, help="default: %(default)s")
    parser.add_argument("--json", help="file for every number")
    return parser


class Contestant(typing.NamedTuple):
    """What a race asks of a contestant in its process.

    train:    takes a training step on a batch -> the loss before the update.
    request:  prepares what a sampling step reads, of a batch; it is not timed.
    sample:   takes a sampling step of a request -> the mean square of what comes out.
    batch:    makes the batch of a step's number.
    module:   the side's, whose `versions()` are asked.
    """

    train: Callable
    request: Callable
    sample: Callable
    batch: Callable
    module: typing.Any


def _answer(make, name, shape, options):
    """Makes a contestant in its process: a function of a question and its arguments."""
    race.pin(options.threads)
    import_side(name)
    before = host.rss_bytes()
    contestant = make(name, shape, options)

    def timed(prepare, call, step):
        argument = prepare(contestant.batch(step))
        begin = time.perf_counter()
        call(argument)
        return time.perf_counter() - begin

    answers = {
        "sample": lambda: contestant.sample(contestant.request(contestant.batch(0))),
        "loss": lambda: contestant.train(contestant.batch(0)),
        "step": functools.partial(timed, lambda batch: batch, contestant.train),
        "forward": functools.partial(timed, contestant.request, contestant.sample),
        "before": lambda: before,
        "peak": _take_peak,
        "versions": contestant.module.versions,
    }
    return lambda question, *details: answers[question](*details)


def _take_peak():
    """The peak of resident memory in bytes; where the kernel can, it is counted anew from then on."""
    peak, reset = host.peak_rss_bytes(), pathlib.Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")
    return peak


def import_side(name):
    """Imports what a contestant computes with, which its memory does not count."""
    for module in ("torch", "diffusers", "peft") if name.startswith("torch") else ("jax", "flax.linen", "optax"):
        if importlib.util.find_spec(module.partition(".")[0]):
            importlib.import_module(module)


def make_trainer(name, shape, options):
    """Makes a Contestant of the DiT."""
    side, precision = name.split("-")
    if side == "torch":
        import peer as module

        trainer = module.Trainer(work.SHAPES[shape], precision, options.threads)
    else:
        import ours as module

        trainer = module.Trainer(work.SHAPES[shape], precision)
    batch = functools.partial(work.batch, work.SHAPES[shape], options.batch)
    return Contestant(trainer.step, lambda batch: batch, trainer.forward, batch, module)


def difference(values, what):
    """Largest relative difference of the float32 contestants' values. Raises RuntimeError beyond TOLERANCE."""
    exact = [value for name, value in values.items() if "float32" in name]
    relative = max(exact) / min(exact) - 1 if exact else 0.0
    if relative > TOLERANCE:
        raise RuntimeError(f"the {what} differ by {relative:.2e}: {values}")
    return relative


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
        *(f"first {what} agree to {value:.1e}" for what, value in report["first_differences"].items()),
    ]
    for question, name_of_question in QUESTIONS.items():
        lines += ["", f"{name_of_question:20}{'s':>9}{'pictures/s':>12}   speed over torch of as many bits"]
        for name, seconds in report["seconds"][question].items():
            median = statistics.median(seconds)
            ratio = report["speed_ratios"][question].get(name)
            shown = "" if ratio is None else f"   {race.Ratio(**ratio)}"
            lines.append(f"{name:20}{median:9.3f}{report['batch'] / median:12.1f}{shown}")
    for when, peaks in report["peak_bytes"].items():
        lines += ["", f"{'memory, peak':20}{'MB':>9}{'of the model':>15}   {when}"]
        lines += [
            f"{name:20}{p / 1e6:9.0f}{(p - report['bytes_before'][name]) / 1e6:15.0f}" for name, p in peaks.items()
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    exit_with(main)
