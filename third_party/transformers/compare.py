"""Step time of training with transformers + torch and with efficientllm, on one dense shape.

  python third_party/transformers/compare.py --shape=10m --steps=20

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

TOLERANCE = 1e-4  # nats, of the first loss between float32 contestants
BASELINE = "torch-float32"
DEFAULT = "torch-float32,ours-float32,ours-float32-unrolled,ours-mixed"


def main(argv=None):
    options = _options(argv)
    shape = work.SHAPES[options.shape]
    names = options.contestants.split(",")
    load = os.getloadavg()[0]
    settings = {name: malloc.settings() for name in names if name.startswith("ours")}  # as efficientllm.main
    contestants = {name: race.Process(_trainer, name, options, environment=settings.get(name)) for name in names}
    try:
        losses = {name: contestant.ask("loss") for name, contestant in contestants.items()}
        difference = check_first_losses(losses)
        wall, cpu, curves = measure(contestants, options.steps)
        versions = {key: value for c in contestants.values() for key, value in c.ask("versions").items()}
    finally:
        for contestant in contestants.values():
            contestant.close()
    report = {
        "shape": options.shape,
        "parameters": shape.parameters,
        "batch": options.batch,
        "length": options.length,
        "threads": options.threads,
        "first_loss_nats": losses,
        "first_loss_difference_nats": difference,
        "step_s": wall,
        "step_cpu_s": cpu,
        "losses_nats": curves,
        "speed_ratios": ratios(wall),
        "cpu_time_ratios": ratios(cpu),
        "load_before": load,
        "provenance": versions | provenance(),
    }
    print(table(report))
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(report, indent=1) + "\n")


def _options(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=work.SHAPES, default="10m")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each contestant")
    parser.add_argument("--batch", type=int, default=4, help="rows per step")
    parser.add_argument("--length", type=int, default=256, help="tokens per row")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="cores and threads per contestant")
    parser.add_argument("--contestants", default=DEFAULT, help=f"of {DEFAULT},torch-bfloat16 (default: %(default)s)")
    parser.add_argument("--json", help="file for every number")
    return parser.parse_args(argv)


def _trainer(name, options):
    """Builds a contestant in its process: a function of a question and its arguments."""
    race.pin(options.threads)
    side, precision, *variant = name.split("-")
    shape = work.SHAPES[options.shape]
    if side == "torch":
        import peer as module

        trainer = module.Trainer(shape, precision, options.threads)
    else:
        import ours as module

        trainer = module.Trainer(shape, precision, options.length, unrolled=variant == ["unrolled"])

    def tokens(step):
        return work.batch_tokens(shape, options.batch, options.length, step)

    def timed(step):
        batch = tokens(step)
        wall, cpu = time.perf_counter(), time.process_time()
        loss = trainer.step(batch)
        return time.perf_counter() - wall, time.process_time() - cpu, loss

    answers = {"loss": lambda: trainer.step(tokens(0)), "step": timed, "versions": module.versions}
    return lambda question, *details: answers[question](*details)


def check_first_losses(losses):
    """Largest difference of the float32 contestants' first losses (nats). Raises RuntimeError beyond TOLERANCE."""
    exact = [loss for name, loss in losses.items() if "float32" in name]
    difference = max(exact, default=0.0) - min(exact, default=0.0)
    if difference > TOLERANCE:
        raise RuntimeError(f"the first losses differ by {difference:.2e} nats: {losses}")
    return difference


def measure(contestants, steps):
    """Runs the race: `({name: wall s per step}, {name: CPU s per step}, {name: loss per step})`."""
    curves = {name: [] for name in contestants}

    def note(block, results):
        for name, (_, _, loss) in results.items():
            curves[name].append(loss)
        losses = ", ".join(f"{name} {curve[-1]:.4f}" for name, curve in curves.items())
        print(f"step {block + 1}: {losses}", file=sys.stderr)

    # The first loss was step 0: it compiled, and warmed the allocators.
    steppers = {name: functools.partial(_step, process) for name, process in contestants.items()}
    wall, cpu, _ = race.columns(race.race(steppers, steps, discarded=1, after_block=note))
    return wall, cpu, curves


def _step(process, block):
    return process.ask("step", block + 1)


def ratios(seconds):
    """`{name: ratio to the baseline}`. Empty if the baseline does not take part."""
    return {
        name: race.ratio_of_medians(seconds[BASELINE], contestant_seconds)._asdict()
        for name, contestant_seconds in seconds.items()
        if BASELINE in seconds
    }


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
    head = (
        f"{report['shape']}: {report['parameters'] / 1e6:.1f} M parameters, {report['batch']} x {report['length']} "
        f"tokens, {report['provenance']['cpu']}, {report['provenance']['cores']} cores, load {report['load_before']}"
    )
    lines = [head, f"first losses agree to {report['first_loss_difference_nats']:.1e} nats", ""]
    lines.append(
        f"{'':24}{'wall s/step':>12}{'tokens/s':>10}{'CPU s/step':>12}   speed over {BASELINE} by wall; by CPU"
    )
    for name, seconds in report["step_s"].items():
        wall, cpu = statistics.median(seconds), statistics.median(report["step_cpu_s"][name])
        row = f"{name:24}{wall:12.3f}{report['batch'] * report['length'] / wall:10.0f}{cpu:12.3f}"
        kinds = [report[kind][name] for kind in ("speed_ratios", "cpu_time_ratios") if name in report[kind]]
        row += ";".join(f"   {race.Ratio(**ratio)}" for ratio in kinds)
        lines.append(row)
    return "\n".join(lines)


if __name__ == "__main__":
    exit_with(main)
