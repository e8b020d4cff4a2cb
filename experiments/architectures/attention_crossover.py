"""Crossover of sparse and dense attention: the context from which sparse is cheaper, in time and in FLOPs.

  python experiments/architectures/attention_crossover.py --lengths=1024,2048,4096,8192,16384 --blocks=7

All contestants run in one process. A block is one forward and backward pass of each, in random order. Ratios are of
medians. Contestants are whole layers with their projections; a narrow model (`--dim`) keeps the projections small.
The predicted crossover is where FLOPs are equal, the measured one where times are equal, both interpolated.
"""

import argparse
import json
import math
import statistics

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.errors import exit_with
from efficientllm.metrics import race
from efficientllm.ops.attention import Context
from efficientllm.record import provenance
from efficientllm.registry import build

DENSE = "dense"


def main(argv=None):
    options = parse_options(argv)
    specs = {DENSE: "gqa", **dict(spec.split("=", 1) for spec in options.sparse.split(";"))}
    rows = []
    for length in map(int, options.lengths.split(",")):
        rows.append(measure(specs, length, options))
        print(json.dumps(rows[-1]), flush=True)
    print(table(rows, specs))
    print(json.dumps(provenance.summary() | vars(options)))


def parse_options(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384", help="tokens of the row")
    parser.add_argument("--sparse", default="nsa=nsa", help="contestants, name=spec separated by ;")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv_heads", type=int, default=1)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--documents", type=int, default=0, help="documents of the packed row; 0: one, without packing")
    parser.add_argument("--blocks", type=int, default=5, help="timed passes of each contestant")
    parser.add_argument("--precision", default="float32", help="float32, mixed or bfloat16")
    return parser.parse_args(argv)


def measure(specs, length, options):
    """`{"length", "seconds": {contestant: median}, "gflops", "temporary_mb"}` of a forward and backward pass."""
    steps = {name: Step(spec, length, options) for name, spec in specs.items()}
    wall, _ = race.race_calls(steps, options.blocks, seed=length)
    return {
        "length": length,
        "seconds": {name: statistics.median(taken) for name, taken in wall.items()},
        "gflops": {name: step.flops / 1e9 for name, step in steps.items()},
        "temporary_mb": {name: step.temporary_bytes / 1e6 for name, step in steps.items()},
    }


class Step:
    """A compiled forward and backward pass of one layer over one row, with its inputs."""

    def __init__(self, spec, length, options):
        shape = {"num_heads": options.heads, "num_kv_heads": options.kv_heads, "head_dim": options.head_dim}
        defaults = {"norm": "rmsnorm(eps=1e-6)", "attention_kernel": "auto", "precision": options.precision}
        defaults |= {"dim": options.dim, "eps": 1e-6}
        mixer = build("mixer", spec, shape | defaults | {"position": "rope(base=10000.0)"})
        index = jnp.arange(length)[None]
        ctx = Context.packed(index)
        if options.documents:
            document_length = -(-length // options.documents)
            ctx = Context.packed(index % document_length, index // document_length)
        x = jax.random.normal(jax.random.key(0), (1, length, options.dim))
        short = Context.packed(index[:, :64])
        ctx = ctx.replace(memo=mixer.init_memo(1, length, options.dim))
        short = short.replace(memo=mixer.init_memo(1, 64, options.dim))
        params = nn.unbox(jax.jit(mixer.init)(jax.random.key(1), x[:, :64], short))

        def loss(params, x):
            return jnp.mean(jnp.square(mixer.apply(params, x, ctx)[0]))

        self._inputs = params, x
        self._run = jax.jit(jax.grad(loss, (0, 1))).lower(params, x).compile()
        self.temporary_bytes = self._run.memory_analysis().temp_size_in_bytes
        self.flops = 3 * (mixer.mix_flops(length) + _linear_flops(mixer, params, length))

    def __call__(self):
        return jax.block_until_ready(self._run(*self._inputs))


def _linear_flops(mixer, params, length):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = ((jax.tree_util.keystr(keys, simple=True, separator="/"), leaf) for keys, leaf in leaves)
    return sum(2 * mixer.kernel_rows(path, length) * leaf.size for path, leaf in paths if path.endswith("kernel"))


def crossover(rows, name, quantity):
    """The length from which `name` has less of a quantity than dense, interpolated linearly between logarithms."""
    points = [(math.log(row["length"]), math.log(row[quantity][name] / row[quantity][DENSE])) for row in rows]
    for (x, y), (x_next, y_next) in zip(points, points[1:], strict=False):
        if y > 0 >= y_next:
            return f"{math.exp(x + (x_next - x) * y / (y - y_next)):.0f}"
    return f"below {rows[0]['length']}" if points[0][1] <= 0 else f"above {rows[-1]['length']}"


def table(rows, specs):
    """Formats all lengths and the crossovers as Markdown."""
    lines = ["| tokens | layer | s | time / dense | FLOPs / dense | temporaries MB |", "|---|---|---|---|---|---|"]
    for row in rows:
        for name in specs:
            time_ratio, flop_ratio = (row[key][name] / row[key][DENSE] for key in ("seconds", "gflops"))
            lines.append(
                f"| {row['length']} | {name} | {row['seconds'][name]:.3f} | {time_ratio:.2f} | {flop_ratio:.2f} | "
                f"{row['temporary_mb'][name]:.0f} |"
            )
    for name in specs:
        if name != DENSE:
            measured, predicted = crossover(rows, name, "seconds"), crossover(rows, name, "gflops")
            lines.append(f"\n{name} is cheaper than dense from {measured} tokens on; by FLOPs from {predicted}.")
    return "\n".join(lines)


if __name__ == "__main__":
    exit_with(main)
