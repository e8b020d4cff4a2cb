"""Speed of prefill and decode with transformers and with efficientllm. llama.cpp has its own script, ../llama_cpp.

  python third_party/transformers/serve.py --model=smollm2-135m --prefill=512 --new=128 --blocks=5

Each contestant is a process with one model in one form. Only one works at a time, in random order within a block.
A block is a prefill of fresh tokens, then greedy decoding of `--new` tokens after a short prompt. Decoding is timed
from the first token to the last. For batches it includes the prefill of the short prompts, because transformers
streams one row alone. Ratios are of medians over blocks, with a 95 % bootstrap interval. Contestants with the same
float32 weights must give the same tokens. The bytes that efficientllm reads per token are compared with the memory's
speed, measured between blocks: a copy in place (a row's `mbu_copy`), a copy from one array into another, and a read.

Products have the precision of configs/infer.py, "auto"; a contestant "ours int4 in float32" has another.
"""

import argparse
import functools
import json
import os
import pathlib
import pydoc_data.topics
import statistics
import tempfile
import time

from efficientllm.errors import exit_with
from efficientllm.metrics import race
from efficientllm.runtime import malloc

PROMPT = 32  # tokens of the prompt before decoding
OURS = {
    "ours float32": "float32",
    "ours bfloat16": "bfloat16",
    "ours int8": "int8()",
    "ours int4": "int4()",
    "ours int4, int8 activations": "int4(activations='int8')",
    "ours as stored": "stored",
}
TORCH = {"transformers float32": "float32", "transformers bfloat16": "bfloat16"}


def main(argv=None):
    options = _options(argv)
    with tempfile.TemporaryDirectory() as folder:
        results, rates = compare(options, _folder(options.model, pathlib.Path(folder) / "model"))
    print(table(results, rates, options))
    if options.json:
        numbers = {name: result | {"memory": rates} for name, result in results.items()}
        pathlib.Path(options.json).write_text(json.dumps(numbers, indent=1) + "\n")


def _options(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="as config.model.pretrained")
    parser.add_argument("--contestants", default="", help="names from the table, separated by ;")
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", help="file for every number")
    return parser.parse_args(argv)


def _folder(model, folder):
    """The model as a folder that transformers reads."""
    from efficientllm import convert

    source = convert.open_source(model)
    if source.path.is_dir():
        return str(source.path)
    convert.convert(source, folder, dtype="float32")
    return str(folder)


def contestants(options):
    """Names of the contestants to run: those of --contestants, or all."""
    names = [*TORCH, *OURS]
    asked = [name.strip() for name in options.contestants.split(";") if name.strip()]
    if unknown := {name for name in asked if _plain_name(name) not in names}:
        raise SystemExit(f"--contestants: {', '.join(sorted(unknown))}: choose from {'; '.join(names)}")
    return asked or names


def _plain_name(name):
    """The name in the table of a contestant `NAME in PRECISION` of ours."""
    return name.partition(" in ")[0]


def _precision(name):
    """`config.model.precision` of a contestant of ours: what its name says, or that of configs/infer.py."""
    return name.partition(" in ")[2] or ("float32" if name == "ours float32" else "auto")


def compare(options, folder):
    """Runs the race: `(results, memory rates)`.

    Results are `{contestant: {"prefill_s": [...], "token_s": [...], "tokens": [...], "bytes": per decode step}}`,
    memory rates `{"copy in place": [...], "copy": [...], "read": [...]}` in byte/s.
    """
    from efficientllm.cost import device_peaks

    processes, sizes = {}, {}
    for name in contestants(options):
        settings = {} if name in TORCH else malloc.settings()  # as efficientllm.main
        processes[name] = race.Process(_server, name, folder, options, environment=settings)
        sizes[name] = processes[name].ask("bytes")  # waits: models are read one at a time
    apart = functools.partial(device_peaks.measure_copy, apart=True)
    measure = {"copy in place": device_peaks.measure_copy, "copy": apart, "read": device_peaks.measure_read}
    rates = {kind: [] for kind in measure}

    def measure_memory(block, results):
        for kind, measured in rates.items():
            measured.append(measure[kind](repeats=3))
        print(f"block {block + 1}/{1 + options.blocks}", flush=True)

    asked = {name: process.ask for name, process in processes.items()}
    prefill, token, tokens = race.columns(race.race(asked, options.blocks, discarded=1, after_block=measure_memory))
    for process in processes.values():
        process.close()
    results = {
        name: {"prefill_s": prefill[name], "token_s": token[name], "tokens": tokens[name][-1], "bytes": sizes[name]}
        for name in processes
    }
    exact = [results[name]["tokens"] for name in ("transformers float32", "ours float32") if name in results]
    if len(exact) == 2 and exact[0] != exact[1]:
        raise SystemExit(f"the greedy tokens differ: {exact}")
    return results, rates


def _server(name, folder, options):
    """Builds a contestant in its process: a function of "bytes" (read per decode step) or of a block's number."""
    if name in TORCH:
        run, size = _transformers(TORCH[name], folder, options), None
    else:
        run, size = _ours(OURS[_plain_name(name)], _precision(name), folder, options)

    def answer(question):
        if question == "bytes":
            return size
        return run(*(_prompts(question, length, options.batch) for length in (options.prefill, PROMPT)))

    return answer


def _prompts(block, length, batch):
    """`batch` rows of token ids, equal for all contestants: bytes of the Python documentation, other ones per block."""
    text = "".join(pydoc_data.topics.topics.values()).encode()
    starts = [(block * batch + row) * 1009 for row in range(batch)]
    return [[3 + byte for byte in text[start : start + length]] for start in starts]


def _transformers(dtype, folder, options):
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    class Clock(transformers.generation.streamers.BaseStreamer):
        def __init__(self):
            self.times = []

        def put(self, value):
            self.times.append(time.perf_counter())

        def end(self):
            pass

    @torch.inference_mode()
    def run(long, short):
        begin = time.perf_counter()
        lm(input_ids=torch.tensor(long), use_cache=True, logits_to_keep=1)
        prefill_s = time.perf_counter() - begin
        ids, clock = torch.tensor(short), Clock()
        streamer = clock if options.batch == 1 else None  # transformers streams one row alone
        settings = {"max_new_tokens": options.new, "min_new_tokens": options.new, "do_sample": False}
        begin = time.perf_counter()
        generated = lm.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer, **settings)
        whole_s = time.perf_counter() - begin
        token_s = whole_s / options.new  # for batches this includes the short prefill, for all contestants
        if streamer:
            times = clock.times[1:]  # the first put is the prompt
            token_s = (times[-1] - times[0]) / (len(times) - 1)
        return prefill_s, token_s, generated[0, len(short[0]) :].tolist()

    return run


def _ours(form, precision, folder, options):
    import jax

    from efficientllm import base_config
    from efficientllm.cost import formulas
    from efficientllm.infer import samplers, setup
    from efficientllm.infer.engine import Engine

    config = base_config.get_config()
    config.task, config.tokenizer, config.quant = "infer", "bytes", form  # no text is read or written
    config.model.pretrained = options.model if form == "stored" else folder
    config.model.precision = precision
    config.infer.prompts, config.infer.baseline = ("x",), ""
    config.infer.batch_size, config.infer.prompt_length = options.batch, max(options.prefill, PROMPT)
    config.infer.max_new_tokens = options.new + 1
    prepared = setup.prepare(config)
    jax.set_mesh(prepared.mesh)
    params = prepared.load(form)
    engine = Engine(prepared.lm, params, samplers.Greedy(), -1, max(options.prefill, PROMPT) + options.new + 1)
    middle = PROMPT + options.new // 2  # the cache grows by a token per step; bytes are those at half its growth

    def run(long, short):
        begin = time.perf_counter()
        jax.block_until_ready(engine.prefill(long).logits_BV)
        prefill_s = time.perf_counter() - begin
        begin = time.perf_counter()
        carry = jax.block_until_ready(engine.prefill(short))
        carry, first = jax.block_until_ready(engine.decode(carry, short, 1))
        if options.batch == 1:
            begin = time.perf_counter()
        _, rest = jax.block_until_ready(engine.decode(carry, short, options.new - 1))
        token_s = (time.perf_counter() - begin) / (options.new - (options.batch == 1))
        return prefill_s, token_s, [int(first[0, 0]), *rest[0].tolist()]

    return run, formulas.decode_bytes(prepared.lm, prepared.boxed, params, options.batch, middle)


def table(results, rates, options):
    """Formats tokens/s of all, and ratios to transformers in bfloat16 or to the first contestant."""
    against = "transformers bfloat16" if "transformers bfloat16" in results else next(iter(results))
    lines = [
        f"| {options.batch} x {options.prefill} prefilled, {options.new} decoded | prefill tokens/s | x {against} "
        f"| decode tokens/s | x {against} | GB/s read | of a copy in place | of a copy | of a read |",
        "|---" * 9 + "|",
    ]
    memory = {kind: statistics.median(result) for kind, result in rates.items()}
    for name, result in results.items():
        cells = [name]
        for key, count in (("prefill_s", options.batch * options.prefill), ("token_s", options.batch)):
            speed = race.ratio_of_medians(results[against][key], result[key])
            cells += [f"{count / statistics.median(result[key]):.1f}", str(speed)]
        if result["bytes"] is None or options.batch > 1:  # the time of a batch includes a prefill
            cells += [""] * 4
        else:
            rate = result["bytes"] / statistics.median(result["token_s"])
            cells += [f"{rate / 1e9:.1f}", *(f"{rate / memory[kind]:.0%}" for kind in memory)]
        lines.append("| " + " | ".join(cells) + " |")
    bandwidths = "; ".join(f"{kind} {rate / 1e9:.1f}" for kind, rate in memory.items())
    return "\n".join([*lines, "", f"Memory, medians of {len(rates['copy'])}, GB/s: {bandwidths}"])


if __name__ == "__main__":
    exit_with(main)
