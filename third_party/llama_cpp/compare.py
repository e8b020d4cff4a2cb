"""Prefill and greedy decoding of one GGUF file by llama.cpp and by efficientllm in int4, in turn.

  python third_party/llama_cpp/compare.py --gguf=model-q4_1.gguf --prompt=512 --new=128

Each contestant has a process of its own and only one works at a time, in random order within a block; prompts are the
same random tokens, fresh in each block. Ratios are of medians over blocks, with a 95 % bootstrap interval.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import pathlib
import random
import statistics
import sys
import time
from unittest import mock

import numpy as np

from efficientllm.errors import UserError, exit_with

DISCARDED = 2  # blocks: compilation, and pages of the file
NAMES = ("llama.cpp", "ours")


def main(argv=None):
    options = _options(argv)
    if importlib.util.find_spec("llama_cpp") is None:
        raise UserError(
            "llama_cpp is missing: pip install -r third_party/llama_cpp/requirements.txt (needs a C++ compiler)"
        )
    if not pathlib.Path(options.gguf).is_file():
        raise UserError(f"--gguf={options.gguf}: no such file")
    contestants = {name: Contestant(name, options) for name in NAMES}
    try:
        times = race(contestants, options)
    finally:
        for contestant in contestants.values():
            contestant.close()
    print(table(times, options))
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps({"options": vars(options), "seconds": times}, indent=1) + "\n")


def _options(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", required=True, help="a Q4_1 file: 32 weights, a scale and a minimum a group")
    parser.add_argument("--prompt", type=int, default=512, help="tokens (default: %(default)s)")
    parser.add_argument("--new", type=int, default=128, help="tokens after them (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="cores and threads of each")
    parser.add_argument("--quant", default="int4(symmetric=False)", help="ours; stored: the file's codes (%(default)s)")
    parser.add_argument("--kv_cache", default="float16", help="ours; llama.cpp keeps float16 (default: %(default)s)")
    parser.add_argument("--json", help="file for every number")
    return parser.parse_args(argv)


class Contestant:
    """A process that holds one model; `ask` waits for its `(prefill s, decode s)` of a prompt."""

    def __init__(self, name, options):
        from efficientllm import allocator

        context = multiprocessing.get_context("spawn")
        self.pipe, far_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(name, options, far_end), daemon=True)
        with mock.patch.dict(os.environ, allocator.huge_pages() if name == "ours" else {}):  # as efficientllm.main
            self.process.start()
        far_end.close()  # so that a process that dies ends our wait

    def ask(self, seed):
        self.pipe.send(seed)
        return self.pipe.recv()

    def close(self):
        self.pipe.close()
        self.process.join()


def _serve(name, options, pipe):
    if hasattr(os, "sched_setaffinity"):  # both size their thread pools by the cores they may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.threads :])
    measured = (_llama_cpp if name == "llama.cpp" else _ours)(options)
    while True:
        try:
            seed = pipe.recv()
        except EOFError:
            return
        prompt = np.random.default_rng(seed).integers(1000, 20_000, options.prompt).tolist()
        pipe.send(measured(prompt))


def _llama_cpp(options):
    import llama_cpp

    size = {"n_ctx": options.prompt + options.new + 8, "n_batch": options.prompt}
    threads = {"n_threads": options.threads, "n_threads_batch": options.threads}
    model = llama_cpp.Llama(options.gguf, **size, **threads, verbose=False)

    def measured(prompt):
        model.reset()
        begin = time.perf_counter()
        model.eval(prompt)
        middle = time.perf_counter()
        for _ in range(options.new):
            model.eval([model.sample(temp=0.0)])
        return middle - begin, time.perf_counter() - middle

    return measured


def _ours(options):
    import flax.linen as nn
    import jax

    from efficientllm import convert, model
    from efficientllm.infer.engine import Engine
    from efficientllm.infer.samplers import Greedy
    from efficientllm.quant.tree import quantize

    source = convert.open_source(options.gguf)
    lm = source.lm(precision="float32", scan=False, kv_cache=options.kv_cache)
    like = nn.unbox(model.abstract_params(lm))
    stored = options.quant == "stored"
    params = source.load_stored(like, lm) if stored else quantize(source.load(like, lm=lm), options.quant)
    engine = Engine(lm, params, Greedy(), -1, options.prompt + options.new)

    def measured(prompt):
        begin = time.perf_counter()
        carry = jax.block_until_ready(engine.prefill([prompt]))
        middle = time.perf_counter()
        jax.block_until_ready(engine.decode(carry, [prompt], options.new))
        return middle - begin, time.perf_counter() - middle

    return measured


def race(contestants, options):
    """`{"prefill" or "decode": {name: [s]}}`."""
    times = {part: {name: [] for name in NAMES} for part in ("prefill", "decode")}
    order = random.Random(0)
    for block in range(DISCARDED + options.blocks):
        for name in order.sample(NAMES, len(NAMES)):
            for part, seconds in zip(times, contestants[name].ask(block), strict=True):
                if block >= DISCARDED:
                    times[part][name].append(seconds)
        print(f"block {block + 1} of {DISCARDED + options.blocks}", file=sys.stderr, flush=True)
    return times


def ratio(baseline, ours, resamples=5_000):
    """Our speed over the baseline's, `(ratio, low, high)`: medians, bootstrapped over paired blocks."""
    draw, pairs = random.Random(0), list(zip(baseline, ours, strict=True))

    def of(sample):
        return statistics.median(b for b, _ in sample) / statistics.median(o for _, o in sample)

    found = sorted(of(draw.choices(pairs, k=len(pairs))) for _ in range(resamples))
    return of(pairs), found[int(0.025 * resamples)], found[int(0.975 * resamples)]


def table(times, options):
    """The race as text."""
    lines = [f"{options.gguf}, {options.threads} threads, ours {options.quant}"]
    for part, tokens in (("prefill", options.prompt), ("decode", options.new)):
        for name in NAMES:
            lines.append(f"{part:8}{name:12}{tokens / statistics.median(times[part][name]):10.1f} tokens/s")
        found, low, high = ratio(*(times[part][name] for name in NAMES))
        lines.append(f"{part:8}ours over llama.cpp {found:.2f} ({low:.2f} .. {high:.2f})")
    return "\n".join(lines)


if __name__ == "__main__":
    exit_with(main)
