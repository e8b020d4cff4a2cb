"""Bytes and perplexity of quantized SmolLM2-135M, on 8 x 512 tokens of the Python documentation.

  python experiments/quantization/quality.py float32 "int4(method='gptq')"

Prints a Markdown table. Calibrated forms read 16 x 512 tokens of the sources of the standard library, which are not
scored.
"""

import argparse
import pathlib
import sysconfig
import time
from pydoc_data.topics import topics

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from efficientllm import convert, model
from efficientllm.errors import exit_with
from efficientllm.ops.attention import Context
from efficientllm.quant import calibrate
from efficientllm.quant.apply import form_of, quantize
from efficientllm.registry import build
from efficientllm.weights import resident_bytes

SPECS = (
    *("float32", "bfloat16", "float16", "int8", "int8(group=32)", "nf4", "int4", "int4(symmetric=False)"),
    *("int4(method='awq')", "int4(method='gptq')", "int4(method='awq', symmetric=False)"),
    *("int4(method='gptq', symmetric=False)", "int4(group=64)", "int4(group=64, method='gptq')"),
    *("int4(embedding='int4')", "int4(embedding='int4', method='gptq', symmetric=False)"),
)
TOKENS = 512


def scored_tokens(tokenizer, rows):
    """The first `rows` x 512 tokens of the sorted, joined topics."""
    text = "\n\n".join(topics[key] for key in sorted(topics))
    return np.asarray(tokenizer.encode(text)[: rows * TOKENS], np.int32).reshape(rows, TOKENS)


def calibration_tokens(tokenizer):
    """The first 512 tokens of each of the 16 largest modules."""
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda path: path.stat().st_size)[-16:]
    return np.asarray([tokenizer.encode(path.read_text()[:8192])[:TOKENS] for path in files], np.int32)


def perplexity(lm, params, ids):
    @jax.jit
    def losses(params, row):
        positions = jnp.arange(TOKENS)[None]
        logits, _, _ = lm.apply({"params": params}, row[None], Context.packed(positions))
        logp = jax.nn.log_softmax(logits[0, :-1])
        return -jnp.take_along_axis(logp, row[1:, None], -1)

    return float(np.exp(np.mean([losses(params, row) for row in ids])))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", default=SPECS, metavar="SPEC", help="forms (default: all of the README)")
    parser.add_argument("--model", default="smollm2-135m", help="as config.model.pretrained (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=8, help="rows of 512 tokens that are scored (default: %(default)s)")
    options = parser.parse_args(argv)
    for spec in options.specs:
        form_of(spec)  # a wrong spec is refused before the model is read
    source = convert.open_source(options.model)
    tokenizer = build("tokenizer", source.tokenizer()).fit(None)
    lm = source.lm(precision="float32", scan=False)
    params = source.load(nn.unbox(model.abstract_params(lm)))
    ids, text = scored_tokens(tokenizer, options.rows), calibration_tokens(tokenizer)
    print("| form | MB | bits a parameter | perplexity | seconds to make |\n|---|---|---|---|---|")
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    for spec in options.specs:
        start = time.perf_counter()
        packed = calibrate.quantize(lm, params, spec, text) if form_of(spec).calibrated else quantize(params, spec)
        taken = time.perf_counter() - start
        size = resident_bytes(jax.block_until_ready(packed))
        value = perplexity(lm, packed, ids)
        print(f"| `{spec}` | {size / 1e6:.1f} | {8 * size / count:.2f} | {value:.3f} | {taken:.0f} |", flush=True)


if __name__ == "__main__":
    exit_with(main)
