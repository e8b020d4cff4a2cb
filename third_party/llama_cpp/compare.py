"""Speed of prefill and greedy decoding of a GGUF file with llama.cpp and with efficientllm in int4.

  python third_party/llama_cpp/compare.py --gguf=model-q4_1.gguf --prompt=512 --new=128

Each contestant has a process of its own. Only one works at a time, in random order within a block. Prompts are the same
random tokens for both, new ones in each block. Ratios are of medians over blocks, with a 95 % bootstrap interval.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import statistics
import time

import numpy as np

from efficientllm.errors import UserError, exit_with
from efficientllm.metrics import race
from efficientllm.runtime import malloc

NAMES = ("llama.cpp", "ours")


def main(argv=None):
    options = _options(argv)
    if importlib.util.find_spec("llama_cpp") is None:
        raise UserError(
            "llama_cpp is missing: pip install -r third_party/llama_cpp/requirements.txt (needs a C++ compiler)"
        )
    if not pathlib.Path(options.gguf).is_file():
        raise UserError(f"--gguf={options.gguf}: no such file")
    settings = {"ours": malloc.settings()}  # as efficientllm.main
    contestants = {name: race.Process(_contestant, name, options, environment=settings.get(name)) for name in NAMES}
    try:
        asked = {name: process.ask for name, process in contestants.items()}
        results = race.race(asked, options.blocks, after_block=race.print_progress(options.blocks))
        times = dict(zip(("prefill", "decode"), race.columns(results), strict=True))
    finally:
        for contestant in contestants.values():
            contestant.close()
    print(table(times, options))
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps({"options": vars(options), "seconds": times}, indent=1) + "\n")


def _options(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", required=True, help="a Q4_1 file: groups of 32 weights with a scale and a minimum")
    parser.add_argument("--prompt", type=int, default=512, help="tokens (default: %(default)s)")
    parser.add_argument("--new", type=int, default=128, help="tokens after them (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="cores and threads per contestant")
    parser.add_argument(
        "--quant",
        default="int4(symmetric=False)",
        help="form of efficientllm's weights; stored: those of the file (%(default)s)",
    )
    parser.add_argument(
        "--kv_cache", default="float16", help="of efficientllm; llama.cpp has float16 (default: %(default)s)"
    )
    parser.add_argument("--json", help="file for every number")
    return parser.parse_args(argv)


def _contestant(name, options):
    """Builds a contestant in its process: a function from a prompt's seed to `(prefill s, decode s)`."""
    race.pin(options.threads)
    measured = (_llama_cpp if name == "llama.cpp" else _ours)(options)
    return lambda seed: measured(np.random.default_rng(seed).integers(1000, 20_000, options.prompt).tolist())


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
    from efficientllm.quant.apply import quantize

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


def table(times, options):
    """Formats the race as text."""
    lines = [f"{options.gguf}, {options.threads} threads, ours {options.quant}"]
    for phase, tokens in (("prefill", options.prompt), ("decode", options.new)):
        for name in NAMES:
            lines.append(f"{phase:8}{name:12}{tokens / statistics.median(times[phase][name]):10.1f} tokens/s")
        speed = race.ratio_of_medians(*(times[phase][name] for name in NAMES))
        lines.append(f"{phase:8}ours over llama.cpp {speed}")
    return "\n".join(lines)


if __name__ == "__main__":
    exit_with(main)
