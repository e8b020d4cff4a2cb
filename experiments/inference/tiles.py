"""Times tiles of the int4 product on the NVIDIA GPU that is here, for `tile` of `efficientllm/quant/pallas_int4.py`.

  python experiments/inference/tiles.py                                 # Qwen2.5's 1.5B and 7B, 1, 8 and 512 rows of x
  python experiments/inference/tiles.py --products='1x8960x1536' --json=tiles.json

Every tile of a product (rows of x, width, outputs) is compiled, checked against float64, and run over copies of the
weights that no cache holds together. Times are those of the kernel alone, medians, by JAX's profiler; beside them
bfloat16's kernels on the same work, by XLA.
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

# gate and up together, q, k and v together, o, down: of 1.5B and of 7B.
PRODUCTS = "1x1536x17920 1x1536x2048 1x1536x1536 1x8960x1536 1x3584x37888 1x18944x3584 8x1536x17920 8x8960x1536"
PRODUCTS += " 512x1536x17920 512x1536x2048 512x8960x1536"
CACHE = 120e6  # bytes of copies of the weights that are multiplied in turn
REPEATS = 3
WORST = 5e-3  # relative error that bfloat16 operands may make


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--products", default=PRODUCTS, help="rows of x, width and outputs, as 1x1536x8960 1x8960x1536")
    parser.add_argument("--json", help="file for every number")
    options = parser.parse_args(argv)
    products = [re.fullmatch(r"(\d+)x(\d+)x(\d+)", name) for name in options.products.split()]
    if not all(products):
        parser.error(f"--products={options.products!r}: each is rows x width x outputs, as 1x1536x8960")
    if jax.default_backend() != "gpu":
        parser.error(f"tiles are of NVIDIA GPUs, and JAX runs on {jax.default_backend()} here")
    found = {each[0]: compare(*map(int, each.groups())) for each in products}
    for name, times in found.items():
        print(table(name, times), flush=True)
    if options.json:
        kind = jax.devices()[0].device_kind
        pathlib.Path(options.json).write_text(json.dumps({"device": kind, "products": found}, indent=1) + "\n")


def candidates(M, W):
    """Tiles that are tried for M rows of x and W bytes of a row of weights, in groups of 16 bytes."""
    if M <= pallas_int4.VECTORS:
        sizes = itertools.product((1, 2, 4, 8, 16), (256, 512, 1024), (1, 2, 4, 8), (None,), (1, 2, 4))
        least, most = 512, 2048  # bytes a warp
    elif M <= pallas_int4.TOKENS // 2:
        sizes, least, most = itertools.product((16, 32, 64), (64, 128, 256), (2, 4), (1, 3), (1, 2, 4)), 0, 4096
    else:
        sizes, least, most = itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3), (1, 2, 4)), 0, 4096
    tiles = itertools.starmap(pallas_int4.Tile, sizes)
    return [t for t in tiles if least <= t.rows * t.width // t.warps <= most and t.parts * t.width <= max(W, t.width)]


def compare(M, K, R):
    """Microseconds of the kernel by the tile, as it is chosen, and with bfloat16 weights."""
    random = np.random.default_rng(0)
    one = Int4(
        jnp.asarray(random.integers(0, 256, (R, K // 2), np.uint8)),
        jnp.asarray(random.random((R, K // 32)) * 0.01, jnp.float16),
        columns=K,
    )
    copies = max(2, int(CACHE / (one.values.nbytes + one.scale.nbytes)))
    x = jnp.asarray(random.standard_normal((M, K)), jnp.bfloat16)
    weights = [jax.tree.map(jnp.copy, one) for _ in range(copies)]
    dense = [jnp.asarray(one.rows(), jnp.bfloat16) + 0 for _ in range(max(2, copies // 3))]
    lowered = {"bfloat16": jax.jit(_dense).lower(x, dense[0])}
    chosen = pallas_int4.tile(M, R, K // 2, 16)
    for each in dict.fromkeys((chosen, *candidates(M, K // 2))):
        with mock.patch.object(pallas_int4, "tile", lambda *sizes, each=each: each):
            ours = functools.partial(pallas_int4.product, operand=jnp.bfloat16, platform="gpu")
            lowered[name_of(each)] = jax.jit(lambda x, w, ours=ours: ours(x, w)).lower(x, one)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        compiled = dict(zip(lowered, pool.map(lambda each: each.compile(), lowered.values()), strict=True))
    exact = np.asarray(x, np.float64) @ np.asarray(one.rows(), np.float64).T
    for name, program in compiled.items():
        y = np.asarray(program(x, dense[0] if name == "bfloat16" else one), np.float64)
        if not np.linalg.norm(y - exact) < WORST * np.linalg.norm(exact):
            raise SystemExit(f"{M}x{K}x{R}, {name}: the product is wrong")
    times = {}
    for name, program in compiled.items():
        over = dense if name == "bfloat16" else weights
        times[name] = _kernel_us(program, x, over) / len(over)
    return {"chosen": name_of(chosen), "bytes": one.values.nbytes + one.scale.nbytes, "us": times}


def _dense(x, rows):
    return jnp.einsum("mk,rk->mr", x, rows, preferred_element_type=jnp.float32)


def _kernel_us(program, x, over):
    """Microseconds on the device of all products of x, the median of repeats."""
    found = []
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                jax.block_until_ready([program(x, each) for each in over])
            found.append(sum(_durations(folder)) / 1e3)
    return statistics.median(found)


def _durations(folder):
    """Nanoseconds of every kernel in a trace."""
    (file,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
    for plane in jax.profiler.ProfileData.from_file(file).planes:
        for line in plane.lines if "/device:GPU" in plane.name else ():
            if "Stream" in line.name:
                yield from (event.duration_ns for event in line.events)


def name_of(tile):
    return f"{tile.rows} x {tile.width}, {tile.warps} warps, {tile.stages} stages, {tile.parts} parts"


def table(name, found):
    times = found["us"]
    ranked = sorted((each for each in times if each != "bfloat16"), key=times.get)
    lines = [f"{name}: {found['bytes'] / 1e6:.1f} MB; bfloat16 {times['bfloat16']:.1f} us"]
    for each in dict.fromkeys((*ranked[:5], found["chosen"])):
        marked = "  chosen" if each == found["chosen"] else ""
        lines.append(f"  {times[each]:8.2f} us  {found['bytes'] / times[each] / 1e3:6.0f} GB/s  {each}{marked}")
    return "\n".join(lines)


if __name__ == "__main__":
    exit_with(main)
