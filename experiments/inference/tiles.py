"""Times of the tiles of the int4 product on an NVIDIA GPU, for `tile` of `efficientllm/quant/pallas_int4.py`.

  python experiments/inference/tiles.py                                 # Qwen2.5's 1.5B and 7B, 1, 8 and 512 rows of x
  python experiments/inference/tiles.py --products='1x8960x1536' --json=tiles.json

Every tile of a product (rows of x, width, outputs) is compiled, checked against float64, and run over copies of the
weights that exceed the caches. Times are medians of the kernel alone, from JAX's profiler. XLA's bfloat16 product is
measured beside them.
"""

import argparse
import concurrent.futures
import functools
import glob
import itertools
import json
import pathlib
import re
import statistics
import sys
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from efficientllm.errors import exit_with
from efficientllm.quant import pallas_int4
from efficientllm.quant.int4 import Int4

# Fused gate and up, fused q, k and v, o, and down, at 1.5B and at 7B.
PRODUCTS = "1x1536x17920 1x1536x2048 1x1536x1536 1x8960x1536 1x3584x37888 1x18944x3584 8x1536x17920 8x8960x1536"
PRODUCTS += " 512x1536x17920 512x1536x2048 512x8960x1536"
CACHE = 120e6  # bytes of the copies of the weights, more than the caches hold
REPEATS = 3
WORST = 5e-3  # largest relative error, from bfloat16 operands


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--products", default=PRODUCTS, help="rows of x, width and outputs, as 1x1536x8960 1x8960x1536")
    parser.add_argument("--json", help="file for every number")
    options = parser.parse_args(argv)
    products = [re.fullmatch(r"(\d+)x(\d+)x(\d+)", name) for name in options.products.split()]
    if not all(products):
        parser.error(f"--products={options.products!r}: write rows x width x outputs, as 1x1536x8960")
    if jax.default_backend() != "gpu":
        parser.error(f"needs an NVIDIA GPU; JAX runs on {jax.default_backend()}")
    results = {match[0]: compare(*map(int, match.groups())) for match in products}
    for name, times in results.items():
        print(table(name, times), flush=True)
    if options.json:
        kind = jax.devices()[0].device_kind
        pathlib.Path(options.json).write_text(json.dumps({"device": kind, "products": results}, indent=1) + "\n")


def candidates(M, W):
    """Tiles to try for M rows of x and rows of weights of W bytes, in groups of 16 bytes."""
    if M <= pallas_int4.VECTORS:
        sizes = itertools.product((1, 2, 4, 8, 16), (256, 512, 1024), (1, 2, 4, 8), (None,), (1, 2, 4))
        least, most = 512, 2048  # bytes per warp
    elif M <= pallas_int4.TOKENS // 2:
        sizes, least, most = itertools.product((16, 32, 64), (64, 128, 256), (2, 4), (1, 3), (1, 2, 4)), 0, 4096
    else:
        sizes, least, most = itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3), (1, 2, 4)), 0, 4096
    tiles = itertools.starmap(pallas_int4.Tile, sizes)
    return [t for t in tiles if least <= t.rows * t.width // t.warps <= most and t.parts * t.width <= max(W, t.width)]


def compare(M, K, R):
    """Measures every tile and XLA's bfloat16 product: `{"chosen": tile, "bytes", "us": {name: microseconds}}`."""
    random = np.random.default_rng(0)
    kernel = Int4(
        jnp.asarray(random.integers(0, 256, (R, K // 2), np.uint8)),
        jnp.asarray(random.random((R, K // 32)) * 0.01, jnp.float16),
        columns=K,
    )
    copies = max(2, int(CACHE / (kernel.values.nbytes + kernel.scale.nbytes)))
    x = jnp.asarray(random.standard_normal((M, K)), jnp.bfloat16)
    weights = [jax.tree.map(jnp.copy, kernel) for _ in range(copies)]
    dense = [jnp.asarray(kernel.rows(), jnp.bfloat16) + 0 for _ in range(max(2, copies // 3))]
    lowered = {"bfloat16": jax.jit(_dense).lower(x, dense[0])}
    chosen = pallas_int4.tile(M, R, K // 2, 16)
    for tile in dict.fromkeys((chosen, *candidates(M, K // 2))):
        with mock.patch.object(pallas_int4, "tile", lambda *sizes, tile=tile: tile):
            product = functools.partial(pallas_int4.product, operand=jnp.bfloat16, platform="gpu")
            lowered[name_of(tile)] = jax.jit(lambda x, w, product=product: product(x, w)).lower(x, kernel)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        compiled = dict(zip(lowered, pool.map(lambda tile: tile.compile(), lowered.values()), strict=True))
    exact = np.asarray(x, np.float64) @ np.asarray(kernel.rows(), np.float64).T
    for name, program in compiled.items():
        y = np.asarray(program(x, dense[0] if name == "bfloat16" else kernel), np.float64)
        if not np.linalg.norm(y - exact) < WORST * np.linalg.norm(exact):
            raise SystemExit(f"{M}x{K}x{R}, {name}: the product is wrong")
    times = {}
    for name, program in compiled.items():
        over = dense if name == "bfloat16" else weights
        times[name] = _kernel_us(program, x, over) / len(over)
    return {"chosen": name_of(chosen), "bytes": kernel.values.nbytes + kernel.scale.nbytes, "us": times}


def _dense(x, rows):
    return jnp.einsum("mk,rk->mr", x, rows, preferred_element_type=jnp.float32)


def _kernel_us(program, x, kernels):
    """Microseconds on the device for the products of x with all kernels, median of repeats."""
    durations_us = []
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                jax.block_until_ready([program(x, kernel) for kernel in kernels])
            durations_us.append(sum(_durations(folder)) / 1e3)
    return statistics.median(durations_us)


def _durations(folder):
    """Nanoseconds of every kernel in a trace."""
    (file,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
    for plane in jax.profiler.ProfileData.from_file(file).planes:
        for line in plane.lines if "/device:GPU" in plane.name else ():
            if "Stream" in line.name:
                yield from (event.duration_ns for event in line.events)


def name_of(tile):
    return f"{tile.rows} x {tile.width}, {tile.warps} warps, {tile.stages} stages, {tile.parts} parts"


def table(name, results):
    times = results["us"]
    ranked = sorted((tile for tile in times if tile != "bfloat16"), key=times.get)
    lines = [f"{name}: {results['bytes'] / 1e6:.1f} MB; bfloat16 {times['bfloat16']:.1f} us"]
    for tile in dict.fromkeys((*ranked[:5], results["chosen"])):
        marked = "  chosen" if tile == results["chosen"] else ""
        lines.append(f"  {times[tile]:8.2f} us  {results['bytes'] / times[tile] / 1e3:6.0f} GB/s  {tile}{marked}")
    return "\n".join(lines)


if __name__ == "__main__":
    exit_with(main)
