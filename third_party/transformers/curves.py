"""Loss curves of mixed-precision and float32 training, beside the spread between seeds.

  python third_party/transformers/curves.py --steps=200 --seeds=3

The text is a random walk on a fixed graph. Every token has four successors, so that the best loss is ln 4 = 1.386 nats.
All runs see the same batches. They differ in precision or in initial weights.
"""

import argparse
import itertools
import statistics

import numpy as np
import ours
import work

from efficientllm.errors import exit_with

SHAPE = work.Shape(layers=4, dim=128, heads=4, kv_heads=2, hidden=384, vocab=512)
BATCH, LENGTH, SUCCESSORS = 4, 64, 4


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    if options.steps < 1 or options.seeds < 2:
        parser.error("--steps must be at least 1, and --seeds at least 2, because seeds are compared")
    curves = {
        precision: [curve(precision, seed, options.steps) for seed in range(options.seeds)]
        for precision in ("float32", "mixed")
    }
    last = max(1, options.steps // 10)
    for precision, runs in curves.items():
        print(f"{precision:8} final loss (mean of the last {last} steps):", *(f"{tail(run, last):.4f}" for run in runs))
    precision_gap = [abs(tail(a, last) - tail(b, last)) for a, b in zip(*curves.values(), strict=True)]
    seed_gap = [abs(tail(a, last) - tail(b, last)) for a, b in itertools.combinations(curves["float32"], 2)]
    print(f"mixed against float32, same seed: mean {statistics.mean(precision_gap):.4f} nats")
    print(f"float32 against float32, other seed: mean {statistics.mean(seed_gap):.4f} nats")


def curve(precision, seed, steps):
    """Losses (nats) of a run from the initial weights of `seed`."""
    trainer = ours.Trainer(SHAPE, precision, LENGTH, seed=seed)
    return [trainer.step(walk(step)) for step in range(steps)]


def walk(step):
    """Tokens `[BATCH, LENGTH]` of a step."""
    graph = np.random.default_rng(0).integers(0, SHAPE.vocab, (SHAPE.vocab, SUCCESSORS))
    random = np.random.default_rng(step + 1)
    tokens = np.empty((BATCH, LENGTH), np.int64)
    tokens[:, 0] = random.integers(0, SHAPE.vocab, BATCH)
    for t in range(1, LENGTH):
        tokens[:, t] = graph[tokens[:, t - 1], random.integers(0, SUCCESSORS, BATCH)]
    return tokens


def tail(losses, count):
    return statistics.mean(losses[-count:])


if __name__ == "__main__":
    exit_with(main)
