"""Drift of a machine's speed: three kinds of work in turn, and the spread of their speeds over time.

  python experiments/aa/drift.py --seconds=180

A Python loop uses one core, a matrix product all cores and their caches, a copy the memory. White noise averages out:
the spread of means over a window n times as long is smaller by sqrt(n). Spread that does not shrink is drift. Longer
runs do not help against drift; runs close to each other in time do.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from efficientllm.errors import exit_with

WINDOWS = (1, 5, 20)  # rounds per mean


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180.0)
    options = parser.parse_args()
    if not options.seconds > 0:
        parser.error(f"--seconds={options.seconds}: must be more than 0")
    works = {"loop": loop, "product": product(), "copy": copy()}
    rates = {name: [] for name in works}
    begin = time.perf_counter()
    end = begin + options.seconds
    while time.perf_counter() < end:
        for name, work in works.items():
            start = time.perf_counter()
            work()
            rates[name].append(1 / (time.perf_counter() - start))
    rounds = len(rates["loop"])
    print(table(rates, (time.perf_counter() - begin) / rounds))


def loop():
    for _ in range(2_000_000):
        pass


def product():
    """Products of 1 MB matrices, which fit a core's cache."""
    x = jnp.ones((512, 512), jnp.float32) / 512

    def run(x):
        return jax.lax.fori_loop(0, 100, lambda _, y: y @ x, x)

    compiled = jax.jit(run).lower(x).compile()
    return lambda: jax.block_until_ready(compiled(x))


def copy():
    """Copies of an array of 256 MB, which fits no cache."""
    x = jnp.ones(64 * 2**20, jnp.float32)
    compiled = jax.jit(lambda x: x + 1).lower(x).compile()
    return lambda: jax.block_until_ready(compiled(x))


def table(rates, seconds):
    """Formats the spread (standard deviation / mean) of means over windows, and the 5th and 95th percentile."""
    head = "".join(f"{f'over {count * seconds:.1f} s':>14}" for count in WINDOWS)
    lines = [f"{'work':10}{head}{'5 % to 95 % of the median':>30}"]
    for name, speeds in rates.items():
        spreads = (spread(speeds, count) for count in WINDOWS)
        cells = "".join(f"{'too short':>14}" if value is None else f"{value:14.1%}" for value in spreads)
        ordered, middle = sorted(speeds), statistics.median(speeds)
        low, high = (ordered[int(share * (len(ordered) - 1))] / middle for share in (0.05, 0.95))
        lines.append(f"{name:10}{cells}{f'{low:.2f} to {high:.2f}':>30}")
    return "\n".join(lines)


def spread(values, count):
    """Standard deviation / mean of the means of `count` consecutive values. None for fewer than two means."""
    means = [statistics.mean(values[i : i + count]) for i in range(0, len(values) - count + 1, count)]
    return statistics.stdev(means) / statistics.mean(means) if len(means) > 1 else None


if __name__ == "__main__":
    exit_with(main)
