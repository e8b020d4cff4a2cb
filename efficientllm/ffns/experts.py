"""The experts of a mixture: their kernels, and each device sending its own tokens through them.

Over `fsdp` the kernels come to the tokens. Over the mesh axis `expert` tokens go to the kernels and back, in two
all-to-alls (GShard: Lepikhin et al. 2020, arXiv:2006.16668, Section 3.2).
"""

import functools
import math
import typing

import flax.linen as nn
import jax

from efficientllm import sharding
from efficientllm.errors import UserError
from efficientllm.ffns import dispatch
from efficientllm.ops.grouped_matmul import grouped_matmul
from efficientllm.weights import Precision, as_input_sharded, axes, can_shard_inputs, parameter

fan_in_normal = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=0)
AXES = {
    "gate": ("expert", "embed", "mlp"),
    "up": ("expert", "embed", "mlp"),
    "down": ("expert", "mlp", "embed"),
}


class Experts(nn.Module):
    """`num_experts` swiglu networks (Shazeer 2020, arXiv:2002.05202, Eq. 6) behind a plan of who computes what.

    `plan` makes a `dispatch.Plan` of `(experts_BTk, num_experts, real_BT=...)`; `kernel` is the grouped product's.
    """

    num_experts: int
    hidden: int
    precision: Precision
    plan: typing.Callable
    kernel: str

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, experts_BTk: jax.Array, weights_BTk: jax.Array, real_BT: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns the weighted sum of each token's experts, and which assignments were kept (None: all).

        `real_BT` says which tokens are no padding; None: all are.
        Raises UserError for a mesh whose axis `expert` does not divide the experts, or a plan that it does not take.
        """
        E, D, F = self.num_experts, x_BTD.shape[-1], self.hidden
        shapes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
        kernels = {name: _Kernel(shape, AXES[name], name=name)() for name, shape in shapes.items()}
        compute = functools.partial(_compute, plan=self.plan, precision=self.precision, kernel=self.kernel)
        mesh = sharding.current_mesh()
        if mesh is not None and mesh.size > 1:
            _check(mesh, E, self.plan)
            split = sharding.spec(AXES["down"], shapes["down"], mesh)[AXES["down"].index("mlp")]
            ways = sharding.count(mesh, split)
            if not can_shard_inputs(kernels["down"], ways):  # it stays whole
                compute, split, ways = functools.partial(compute, hidden=split), None, 1
            shards = {"gate": 1, "up": 1, "down": ways}
            kernels = {name: as_input_sharded(kernel, shards[name]) for name, kernel in kernels.items()}
            compute = _per_device(compute, kernels, x_BTD.shape, mesh, split, self.plan is dispatch.dropless)
        return compute(x_BTD, experts_BTk, weights_BTk, kernels, real_BT)


class _Kernel(nn.Module):
    shape: tuple
    axes: tuple

    @nn.compact
    def __call__(self):
        return parameter(self, "kernel", nn.with_logical_partitioning(fan_in_normal, self.axes), self.shape)


def _check(mesh, num_experts, plan):
    ways = mesh.shape["expert"]
    if ways > 1 and plan is dispatch.dropless:
        raise UserError(
            f"config.mesh: expert = {ways} needs experts of a capacity, which moe's dispatch = 'dropless' has not; "
            "take dispatch = 'capacity' with a capacity_factor, or the mesh axis fsdp in place of expert"
        )
    if num_experts % ways:
        raise UserError(
            f"config.mesh: expert = {ways} does not divide moe's num_experts = {num_experts}; "
            f"{math.gcd(ways, num_experts)} would, or fsdp in place of expert"
        )


def _compute(x_BTD, experts_BTk, weights_BTk, kernels, real_BT, *, plan, precision, kernel, ways=1, hidden=None):
    """`ways`: the devices of the mesh axis `expert`, each of which has `kernels` of its own experts alone.

    `hidden`: the mesh axes over which the hidden width is divided where `down` is whole.
    """
    k, D, E = experts_BTk.shape[-1], x_BTD.shape[-1], ways * kernels["gate"].shape[0]
    plan = plan(experts_BTk, E, real_BT=real_BT)

    def product(x, name):
        return grouped_matmul(x, kernels[name], plan.sizes_E, precision, kernel)

    x_rD = _send(dispatch.to_experts(x_BTD.reshape(-1, D), plan), E, ways)
    hidden_rF = jax.nn.silu(product(x_rD, "gate")) * product(x_rD, "up")
    # The weights multiply ahead of the last product: its outputs need not be kept for the backward pass.
    weights_r1 = _send(dispatch.weights_of_rows(weights_BTk.reshape(-1, k), plan).astype(hidden_rF.dtype), E, ways)
    hidden_rF = hidden_rF * weights_r1
    if hidden:
        hidden_rF = jax.lax.all_gather(hidden_rF, hidden, axis=1, tiled=True)
    y_nD = dispatch.from_experts(_return(product(hidden_rF, "down"), E, ways), plan)
    kept = None if plan.kept_nk is None else plan.kept_nk.reshape(experts_BTk.shape)
    return y_nD.reshape(x_BTD.shape), kept


def _send(x_rD, num_experts, ways):
    """This device's rows for all experts -> all devices' rows for this device's experts, sorted by expert as before."""
    if ways == 1:
        return x_rD
    x_ErD = x_rD.reshape(num_experts, -1, x_rD.shape[-1])
    return jax.lax.all_to_all(x_ErD, "expert", 0, 1, tiled=True).reshape(x_rD.shape)


def _return(y_rD, num_experts, ways):
    """The inverse of `_send`."""
    if ways == 1:
        return y_rD
    y_ErD = y_rD.reshape(num_experts // ways, -1, y_rD.shape[-1])
    return jax.lax.all_to_all(y_ErD, "expert", 1, 0, tiled=True).reshape(y_rD.shape)


def _per_device(compute, kernels, x_shape, mesh, split, divided):
    """`compute` under shard_map, each device on its own tokens: a part of each row if `divided`, else whole rows.

    All-gathers this layer's kernels, still quantized, over every mesh axis that shards them but two. The hidden width
    stays sharded over the mesh axes `split`: each device computes its share of every expert, and the shares are summed.
    Where a quantized `down` cannot be sharded so, `split` is None and the hidden vectors are gathered instead. Experts
    stay sharded over the axis `expert`, to whose devices the tokens are sent.
    """
    kernels_axes = {name: axes(kernel, AXES[name]) for name, kernel in kernels.items()}
    layouts = jax.tree.map(lambda kernel, names: sharding.spec(names, kernel.shape, mesh), kernels, kernels_axes)
    tokens = sharding.spec(("batch", "length" if divided else None, None), x_shape, mesh)

    def near(kernels, name):
        gather = functools.partial(_gather, divided=name != "down" or split is not None)
        return jax.tree.map(gather, kernels[name], kernels_axes[name], layouts[name])

    def on_device(x_BTD, experts_BTk, weights_BTk, kernels, real_BT):
        whole = {name: near(kernels, name) for name in kernels}
        y_BTD, kept_BTk = compute(x_BTD, experts_BTk, weights_BTk, whole, real_BT, ways=mesh.shape["expert"])
        return (jax.lax.psum(y_BTD, split) if split else y_BTD), kept_BTk

    specs = (tokens, tokens, tokens, layouts, jax.sharding.PartitionSpec(*tokens[:2]))
    # The backward pass gathers again: kept, the kernels of all layers would lie whole on every device.
    on_device = jax.checkpoint(on_device, policy=_not_gathered)
    # Loops whose carries start as constants do not type-check per mesh axis, hence check_vma.
    return jax.shard_map(on_device, in_specs=specs, out_specs=tokens, check_vma=False)


def _not_gathered(primitive, *_, **__):
    return primitive.name != "all_gather"


def _gather(kernel, axes, layout, divided):
    """`divided`: whether the hidden width is."""
    for dimension, (axis, stored) in enumerate(zip(axes, layout, strict=True)):
        if stored and stored != "expert" and not (divided and axis == "mlp"):
            kernel = jax.lax.all_gather(kernel, stored, axis=dimension, tiled=True)
    return kernel
