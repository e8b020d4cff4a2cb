"""Times of quantized matrix products of M rows, beside float32 in XLA, torch's int4 and the copy bandwidth.

  python experiments/quantization/products.py 1 8

Prints a Markdown table: microseconds per product, with GB/s of weights in brackets. Times are medians of blocks in
which all contestants run in random order, each over so many copies of the matrix that they exceed the caches. Shapes
are SmolLM2-135M's, inputs x outputs.
"""

import argparse
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from efficientllm.cost import device_peaks
from efficientllm.errors import exit_with
from efficientllm.metrics import race
from efficientllm.quant import matmul as products
from efficientllm.quant.apply import quantize
from efficientllm.weights import matmul, resident_bytes

SHAPES = ((576, 576), (576, 192), (576, 1536), (1536, 576), (576, 49152))
FORMS = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "int8": "int8",
    "int4": "int4",
    "int4 asymmetric": "int4(symmetric=False)",
    "int4, int8 activations": "int4(activations='int8')",
    "nf4": "nf4",
}
BYTES = 64 * 2**20  # read per block in float32
BLOCKS = 15


def medians(contestants):
    """Median seconds of each contestant."""
    wall, _ = race.race_calls(contestants, BLOCKS)
    return {name: statistics.median(seconds) for name, seconds in wall.items()}


def package_product(spec, kernels, x):
    """`(function that multiplies x with every kernel in the form `spec`, bytes of one kernel)`."""
    leaves = [quantize({"kernel": kernel}, spec)["kernel"] for kernel in kernels]
    run = jax.jit(lambda x, leaves: [matmul(x, leaf, "float32") for leaf in leaves])
    return lambda: jax.block_until_ready(run(x, leaves)), resident_bytes(leaves[0])


def torch_product(K, N, rows, copies):
    """The same with torch's int4 kernel and bfloat16 activations and scales. None where torch is not installed."""
    try:
        import torch
    except ImportError:
        return None
    ops = torch.ops.aten

    def pack():
        return ops._convert_weight_to_int4pack_for_cpu(torch.randint(0, 15, (N, K), dtype=torch.int32), 1)

    kernels, scales = [pack() for _ in range(copies)], torch.ones(K // 32, N, 2, dtype=torch.bfloat16)
    x = torch.ones(rows, K, dtype=torch.bfloat16)

    def run():
        for kernel in kernels:
            ops._weight_int4pack_mm_for_cpu(x, kernel, 32, scales)

    return run, N * K * 5 / 8


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int, nargs="*", default=[1], metavar="M", help="rows of x (default: 1)")
    parser.add_argument("--native", action="store_true", help="use the C++ products for any number of rows")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="number of shapes (default: all)")
    options = parser.parse_args(argv)
    if min(options.rows) < 1 or not 1 <= options.shapes <= len(SHAPES):
        parser.error(f"M must be at least 1, and --shapes between 1 and {len(SHAPES)}")
    products.FEW_ROWS = 10**9 if options.native else products.FEW_ROWS
    copy, read = device_peaks.measure_copy(apart=True), device_peaks.measure_read()
    print(f"from one array into another {copy / 1e9:.1f} GB/s, read and written; read {read / 1e9:.1f} GB/s\n")
    names = [*FORMS, "torch int4"]
    print("| shape | rows | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 2))
    rng = np.random.default_rng(0)
    for K, N in SHAPES[: options.shapes]:
        copies = max(1, BYTES // (4 * K * N))
        kernels = [jnp.asarray(rng.standard_normal((K, N), np.float32)) for _ in range(copies)]
        for M in options.rows:
            x = jnp.asarray(rng.standard_normal((M, K), np.float32))
            contestants = {name: package_product(spec, kernels, x) for name, spec in FORMS.items()}
            contestants |= {"torch int4": torch_product(K, N, M, copies)}
            seconds = medians({name: contestant[0] for name, contestant in contestants.items() if contestant})
            cells = [
                f"{1e6 * seconds[name] / copies:.0f} ({contestants[name][1] * copies / seconds[name] / 1e9:.1f})"
                if name in seconds
                else ""
                for name in names
            ]
            print(f"| {K}x{N} | {M} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    exit_with(main)
