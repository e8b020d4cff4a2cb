"""Cost of a mixture of experts beside a dense ffn of equal active parameters: time and memory of a training step.

  python experiments/moe_cost/run.py --shapes=tiny,medium --blocks=30
  python experiments/moe_cost/run.py --shapes=token --forward

All contestants run in one process. A block is one forward and backward pass of each, in random order. Ratios are of
medians over blocks, with a 95 % bootstrap interval. Before anything is timed, the sparse contestants that compute the
same function must agree.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.errors import exit_with
from efficientllm.ffns import routing
from efficientllm.metrics import race
from efficientllm.record import provenance
from efficientllm.registry import build

DISCARDED = 3  # blocks


@dataclasses.dataclass(frozen=True)
class Shape:
    """`rows` x `length` tokens of width `dim`; `top_k` of `experts` swiglus of width `hidden`."""

    rows: int
    length: int
    dim: int
    experts: int
    top_k: int
    hidden: int


SHAPES = {
    "tiny": Shape(rows=8, length=128, dim=128, experts=8, top_k=2, hidden=256),
    "medium": Shape(rows=8, length=128, dim=512, experts=8, top_k=2, hidden=1024),
    "long": Shape(rows=4, length=1024, dim=256, experts=8, top_k=2, hidden=512),
    "fine": Shape(rows=16, length=128, dim=256, experts=32, top_k=4, hidden=256),
    "token": Shape(rows=1, length=1, dim=512, experts=64, top_k=6, hidden=256),
    "tokens": Shape(rows=8, length=1, dim=512, experts=64, top_k=6, hidden=256),
}
SPARSE = {"dropless": "", "capacity 1.25": "dispatch='capacity'", "ragged_dot": "kernel='ragged_dot'"}


def main(argv=None):
    options = _options(argv)
    reports = {}
    for name in options.shapes.split(","):
        reports[name] = measure(SHAPES[name], options)
        print(table(name, SHAPES[name], reports[name]), flush=True)
    print(json.dumps(provenance.summary() | {"precision": options.precision, "blocks": options.blocks}))
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(reports, indent=1) + "\n")


def _options(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="tiny,medium,fine", help=f"of {','.join(SHAPES)} (default: %(default)s)")
    parser.add_argument("--forward", action="store_true", help="time the forward pass alone, as in decoding")
    parser.add_argument("--blocks", type=int, default=30, help="timed steps of each contestant")
    parser.add_argument("--precision", default="float32", help="float32, mixed or bfloat16 (default: %(default)s)")
    parser.add_argument("--json", help="file for every number")
    return parser.parse_args(argv)


def measure(shape, options):
    """`{contestant: {"wall_s", "cpu_s", "temporary_bytes", "model_bytes", ratios...}}`."""
    steps, models = layers(shape, options.precision, options.forward)
    check_agreement({name: steps[name] for name in ("dropless", "ragged_dot", "all experts")}, options.precision)
    wall, cpu = race.race_calls(steps, options.blocks, discarded=DISCARDED)
    report = {}
    for name, step in steps.items():
        report[name] = {
            "wall_s": wall[name],
            "cpu_s": cpu[name],
            "wall_ratio": race.ratio_of_medians(wall[name], wall["dense"]),
            "cpu_ratio": race.ratio_of_medians(cpu[name], cpu["dense"]),
            "temporary_bytes": step.memory_bytes,
            "model_bytes": models.get(name),
        }
    return report


class Step:
    """A compiled forward pass, or forward and backward, with its inputs."""

    def __init__(self, apply, params, x, forward):
        def loss(params, x):
            y, aux = apply(nn.unbox(params), x)
            return jnp.mean(jnp.square(y.astype(jnp.float32))) + sum(aux.get("losses", {}).values()), y

        step = loss if forward else jax.value_and_grad(loss, (0, 1), has_aux=True)
        self._inputs = params, x
        self._run = jax.jit(step).lower(params, x).compile()
        self.memory_bytes = self._run.memory_analysis().temp_size_in_bytes

    def __call__(self):
        return jax.block_until_ready(self._run(*self._inputs))


def layers(shape, precision, forward):
    """`({name: Step}, {name: bytes of temporaries by the analytic model})`."""
    key = jax.random.key(0)
    dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    x = jax.random.normal(key, (shape.rows, shape.length, shape.dim), dtype)
    dense = build("ffn", f"swiglu(hidden={shape.top_k * shape.hidden})", {"precision": precision})
    steps = {"dense": Step(dense.apply, dense.init(key, x), x, forward)}
    spec = f"moe(num_experts={shape.experts}, top_k={shape.top_k}, hidden={shape.hidden}, {{}})"
    models = {}  # the formula is for a training step
    for name, options in SPARSE.items():
        moe = build("ffn", spec.format(options), {"precision": precision})
        params = moe.init(key, x)
        steps[name] = Step(moe.apply, params, x, forward)
        models[name] = None if forward else moe.temporary_bytes(shape.rows, shape.length, shape.dim)
    steps["all experts"] = Step(lambda params, x: _all_experts(params, x, shape), params, x, forward)
    return steps, models


def _all_experts(params, x, shape):
    """The same function computed with every expert on every token. The reference for `check_agreement`."""
    tree = params["params"]
    logits = x.astype(jnp.float32) @ tree["router"]["kernel"]
    routed = routing.route(logits, shape.top_k, "softmax", True, 1.0)
    chosen = routed.experts_BTk[..., None] == jnp.arange(shape.experts)
    weights = jnp.sum(jnp.where(chosen, routed.weights_BTk[..., None], 0.0), 2).astype(x.dtype)
    gate, up, down = (tree["experts"][name]["kernel"].astype(x.dtype) for name in ("gate", "up", "down"))
    hidden = jax.nn.silu(jnp.einsum("btd,edf->ebtf", x, gate)) * jnp.einsum("btd,edf->ebtf", x, up)
    y = jnp.einsum("ebtf,efd->btd", hidden * jnp.moveaxis(weights, -1, 0)[..., None], down)
    load = routing.load(routed.experts_BTk, shape.experts)
    balance, z_loss = routing.load_balance_loss(routed, load), routing.z_loss(logits)
    return y, {"losses": {"load_balance": 0.01 * balance, "z_loss": 0.001 * z_loss}}


def check_agreement(steps, precision):
    """Raises RuntimeError if contestants of the same function differ in outputs or gradients."""
    results = {name: jax.tree.leaves(step()) for name, step in steps.items()}
    for name, arrays in results.items():
        for array, reference in zip(arrays, results["all experts"], strict=True):
            array, reference = array.astype(jnp.float32), reference.astype(jnp.float32)
            error = float(jnp.linalg.norm(array - reference) / jnp.maximum(jnp.linalg.norm(reference), 1e-30))
            if error > (1e-4 if precision == "float32" else 5e-2):
                raise RuntimeError(f"{name} differs from all experts by {error:.1e} in an array of {array.shape}")


def table(name, shape, report):
    """Formats one shape's report as Markdown."""
    tokens = shape.rows * shape.length
    lines = [
        f"\n**{name}**: {tokens} tokens, D={shape.dim}, E={shape.experts}, k={shape.top_k}, F={shape.hidden}\n",
        "| layer | ms | time / dense | CPU time / dense | temporaries MB | / formula |",
        "|---|---|---|---|---|---|",
    ]
    for contestant, row in report.items():
        model = f"{row['temporary_bytes'] / row['model_bytes']:.2f}" if row["model_bytes"] else ""
        milliseconds = 1e3 * statistics.median(row["wall_s"])
        lines.append(
            f"| {contestant} | {milliseconds:.1f} | {row['wall_ratio']} | {row['cpu_ratio']} | "
            f"{row['temporary_bytes'] / 1e6:.1f} | {model} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    exit_with(main)
