"""Time of prefill with a picture, decoding and LoRA steps of a vision-language model, with transformers and with us.

  python third_party/transformers/vision.py --size=smollm2 --blocks=8

transformers (+ peft) writes a Qwen2.5-VL of random weights, and all contestants read that folder. A race is as in
serve.py: a process each, one at a time, in random order within a block. Prefill reads a picture and `--text` tokens:
the vision tower, the language model, and the logits of the first new token. Decoding is greedy, `--new` tokens after
it. A step trains LoRA adapters of the language model on two rows of `--length` tokens with a picture each. Contestants
in float32 must agree before anything is timed: on the first logits, greedy tokens, and the first loss.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

import compare
import numpy as np
import vision_work as work

from efficientllm.errors import exit_with
from efficientllm.metrics import race
from efficientllm.runtime import cpuinfo, malloc

TOLERANCES = {"logits": 1e-3, "loss": 1e-4}  # relative, between float32 contestants
BASELINES = {"float32": "torch-float32", "16 bits": "torch-bfloat16"}
DEFAULT = "torch-float32,ours-float32,torch-bfloat16,ours-mixed,ours-bfloat16"
WORK = {"prefill": "serve", "decode": "serve", "step": "tune"}
ROWS = 2  # of a training batch


def main(argv=None):
    options = _options(argv)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        parameters = work.write_folder(options.size, folder)
        asked = options.work.split(",")
        reports = [
            compare_contestants(kind, questions, folder, options)
            for kind in ("serve", "tune")
            if (questions := [question for question in asked if WORK[question] == kind])
        ]
    report = {
        "size": options.size,
        "parameters": parameters,
        "settings": {name: vars(options)[name] for name in ("pixels", "text", "new", "length", "threads")},
        "seconds": {question: seconds for part in reports for question, seconds in part["seconds"].items()},
        "differences": {name: value for part in reports for name, value in part["differences"].items()},
        "load_before": load,
        "multiplies_bfloat16": multiplies_bfloat16(),
        "provenance": {key: value for part in reports for key, value in part["versions"].items()}
        | compare.provenance(),
    }
    report["speed_ratios"] = {question: ratios(seconds) for question, seconds in report["seconds"].items()}
    print(table(report))
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(report, indent=1) + "\n")


def _options(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=work.SIZES, default="tiny")
    parser.add_argument("--blocks", type=int, default=8, help="timed calls of each contestant")
    parser.add_argument("--work", default=",".join(WORK), help="default: %(default)s")
    parser.add_argument("--pixels", type=int, default=448, help="side of a picture, a multiple of 28")
    parser.add_argument("--text", type=int, default=32, help="tokens of a prompt beside those of its picture")
    parser.add_argument("--new", type=int, default=32, help="tokens decoded after the first")
    parser.add_argument("--length", type=int, default=512, help="tokens of a training row, the picture's included")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="cores and threads per contestant")
    parser.add_argument("--contestants", default=DEFAULT, help="default: %(default)s")
    parser.add_argument("--json", help="file for every number")
    return parser.parse_args(argv)


def compare_contestants(kind, questions, folder, options):
    """Runs the races of one kind of contestants -> `{"seconds", "differences", "versions"}`."""
    names = options.contestants.split(",")
    settings = {name: malloc.settings() for name in names if name.startswith("ours")}  # as efficientllm.main
    processes = {
        name: race.Process(_answer, kind, name, folder, options, environment=settings.get(name)) for name in names
    }
    try:
        first = {name: process.ask("first") for name, process in processes.items()}
        differences = check_equal({name: value for name, value in first.items() if name.endswith("float32")})
        seconds = {question: measure(processes, question, options.blocks) for question in questions}
        versions = {key: value for process in processes.values() for key, value in process.ask("versions").items()}
    finally:
        for process in processes.values():
            process.close()
    return {"seconds": seconds, "differences": differences, "versions": versions}


def _answer(kind, name, folder, options):
    """Makes a contestant in its process: a function of a question and the number of a block."""
    race.pin(options.threads)
    side, precision = name.split("-")
    if side == "torch":
        import vision_peer as module
    else:
        import vision_ours as module
    make = _server if kind == "serve" else _tuner
    answers = make(module, folder, precision, options) | {"versions": module.versions}
    return lambda question, *details: answers[question](*details)


def _server(module, folder, precision, options):
    length = options.text + (options.pixels // work.PATCH // work.MERGE) ** 2 + options.new + 1
    server = module.Server(folder, precision, options.threads, length)
    prompt = functools.partial(work.prompt, folder, options.pixels, options.text)

    def first():
        logits = server.logits(server.prefill(prompt(0)))
        return {"logits": logits, "tokens": server.decode(prompt(0), options.new)[1]}

    def decode(number):
        return server.decode(prompt(number), options.new)[0] / options.new

    return {"first": first, "prefill": lambda number: _timed(server.prefill, prompt(number)), "decode": decode}


def _tuner(module, folder, precision, options):
    prompts = functools.partial(work.batch, folder, options.pixels, options.length, ROWS)
    tuner = module.Tuner(folder, precision, options.threads, prompts(0))

    def first():
        return {"loss": tuner.step(tuner.prepare(prompts(0))), "trained parameters": tuner.trained}

    return {"first": first, "step": lambda number: _timed(tuner.step, tuner.prepare(prompts(number)))}


def _timed(call, argument):
    begin = time.perf_counter()
    call(argument)
    return time.perf_counter() - begin


def check_equal(first):
    """Relative differences of what the float32 contestants computed first. Raises RuntimeError beyond TOLERANCES."""
    baseline, differences = next(iter(first.values()), {}), {}
    for name, result in first.items():
        for what, value in result.items():
            if what in TOLERANCES:
                expected = np.asarray(baseline[what])
                relative = float(np.abs(value - expected).max() / np.abs(expected).max())
                differences[what] = max(relative, differences.get(what, 0.0))
                if relative > TOLERANCES[what]:
                    raise RuntimeError(f"{name}: the first {what} differ by {relative:.1e}")
            elif value != baseline[what]:
                raise RuntimeError(f"{name}: the {what} are {value}, and {baseline[what]} of {next(iter(first))}")
    return differences


def measure(processes, question, blocks):
    """Runs the race of a question: `{name: seconds of the counted blocks}`."""

    def asked(process, block):
        return process.ask(question, block + 1)

    def note(block, seconds):
        shown = ", ".join(f"{name} {value:.4f} s" for name, value in seconds.items())
        print(f"{question} {block + 1}: {shown}", file=sys.stderr, flush=True)

    contestants = {name: functools.partial(asked, process) for name, process in processes.items()}
    return race.race(contestants, blocks, discarded=2, after_block=note)


def ratios(seconds):
    """`{name: its speed over torch's of the same bits}`; empty for baselines that do not take part."""
    speeds = {}
    for name in seconds:
        baseline = BASELINES["float32" if name.endswith("float32") else "16 bits"]
        if baseline in seconds:
            speeds[name] = race.ratio_of_medians(seconds[baseline], seconds[name])._asdict()
    return speeds


def multiplies_bfloat16():
    """Whether the CPU has instructions for products of bfloat16; None where the kernel does not say."""
    return cpuinfo.bfloat16_instructions() is not None if "flags" in cpuinfo.first_processor() else None


def table(report):
    """Formats the report as text."""
    origin, settings = report["provenance"], report["settings"]
    says = {True: "multiplies bfloat16", False: "does not multiply bfloat16", None: "unknown for bfloat16"}
    bits = says[report["multiplies_bfloat16"]]
    lines = [
        f"{report['size']}: {report['parameters'] / 1e6:.1f} M parameters, a picture of {settings['pixels']} pixels "
        f"squared, {origin['cpu']} ({bits}), {settings['threads']} of {origin['cores']} cores, load "
        f"{report['load_before']}",
        *(f"first {what} agree to {value:.1e} in float32" for what, value in report["differences"].items()),
    ]
    titles = {
        "prefill": f"prefill, {settings['text']} tokens and a picture",
        "decode": f"decoding, a token of {settings['new']}",
        "step": f"LoRA step, {ROWS} x {settings['length']} tokens",
    }
    for question, seconds in report["seconds"].items():
        lines += ["", f"{titles[question]:36}{'ms':>10}   speed over torch of as many bits"]
        for name, values in seconds.items():
            ratio = report["speed_ratios"][question].get(name)
            shown = "" if ratio is None else f"   {race.Ratio(**ratio)}"
            lines.append(f"{name:36}{1e3 * statistics.median(values):10.2f}{shown}")
    return "\n".join(lines)


if __name__ == "__main__":
    exit_with(main)
