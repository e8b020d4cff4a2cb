"""Expert kernels of a mixture of experts, and their products under a mesh.

Over the mesh axis `fsdp` kernels are all-gathered. Over the mesh axis `expert` tokens move to the devices of their
experts and back in two all-to-alls (GShard: Lepikhin et al. 2020, arXiv:2006.16668, Section 3.2). Letters as in
`dispatch`: n tokens, k experts of a token, r rows of the experts' input.
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
    """`num_experts` SwiGLU networks (Shazeer 2020, arXiv:2002.05202, Eq. 6) with dispatch.

    `plan(experts_BTk, num_experts, real_BT=...)` returns a `dispatch.Plan`. `kernel` is a registered `grouped_kernel`.
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
        """Returns `(the weighted sum of each token's experts, the kept assignments [B, T, k]; None: all are kept)`.

        `real_BT` is False for padding; None: no token is padding. Raises UserError where the mesh axis `expert` does
        not divide the experts, or where the plan does not support that axis.
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
            if not can_shard_inputs(kernels["down"], ways):  # `down` is replicated over the hidden width
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
    """Computes the experts on one device: dispatch, three grouped products, and the sum over a token's rows.

    `ways` is the size of the mesh axis `expert`; `kernels` are those of this device's experts. `hidden` names the mesh
    axes that shard the hidden width where `down` is replicated.
    """
    k, D, E = experts_BTk.shape[-1], x_BTD.shape[-1], ways * kernels["gate"].shape[0]
    plan = plan(experts_BTk, E, real_BT=real_BT)

    def product(x, name):
        return grouped_matmul(x, kernels[name], plan.sizes_E, precision, kernel)

    x_rD = _send(dispatch.to_experts(x_BTD.reshape(-1, D), plan), E, ways)
    hidden_rF = jax.nn.silu(product(x_rD, "gate")) * product(x_rD, "up")
    # The weights multiply before the last product, so its outputs are not saved for the backward pass.
    weights_r1 = _send(dispatch.weights_of_rows(weights_BTk.reshape(-1, k), plan).astype(hidden_rF.dtype), E, ways)
    hidden_rF = hidden_rF * weights_r1
    if hidden:
        hidden_rF = jax.lax.all_gather(hidden_rF, hidden, axis=1, tiled=True)
    y_nD = dispatch.from_experts(_return(product(hidden_rF, "down"), E, ways), plan)
    kept = None if plan.kept_nk is None else plan.kept_nk.reshape(experts_BTk.shape)
    return y_nD.reshape(x_BTD.shape), kept


def _send(x_rD, num_experts, ways):
    """Sends rows to the devices of their experts by an all-to-all; received rows are sorted by expert too."""
    if ways == 1:
        return x_rD
    x_ErD = x_rD.reshape(num_experts, -1, x_rD.shape[-1])
    return jax.lax.all_to_all(x_ErD, "expert", 0, 1, tiled=True).reshape(x_rD.shape)


def _return(y_rD, num_experts, ways):
    """Returns rows to the devices of their tokens, the inverse of `_send`."""
    if ways == 1:
        return y_rD
    y_ErD = y_rD.reshape(num_experts // ways, -1, y_rD.shape[-1])
    return jax.lax.all_to_all(y_ErD, "expert", 1, 0, tiled=True).reshape(y_rD.shape)


def _per_device(compute, kernels, x_shape, mesh, split, divided):
    """Wraps `compute` in shard_map over the tokens: a shard of each row if `divided`, else whole rows.

    All-gathers this layer's kernels, still quantized, over every mesh axis that shards them but two:

    - The hidden width stays sharded over the mesh axes `split`. Each device computes a partial sum of every expert, and
      a psum adds them. Where a quantized `down` cannot be sharded so, `split` is None and the hidden vectors are
      all-gathered instead.
    - Experts stay sharded over the mesh axis `expert`; tokens are sent to its devices.
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
    # The backward pass all-gathers again: saved, the gathered kernels of all layers would fill every device.
    on_device = jax.checkpoint(on_device, policy=_not_gathered)
    # Loops whose carries start as constants do not type-check per mesh axis, hence check_vma.
    return jax.shard_map(on_device, in_specs=specs, out_specs=tokens, check_vma=False)


def _not_gathered(primitive, *_, **__):
    return primitive.name != "all_gather"


def _gather(kernel, axes, layout, divided):
    """All-gathers a kernel over the mesh axes of `layout` but `expert`, and but those of a `divided` hidden width."""
    for dimension, (axis, stored) in enumerate(zip(axes, layout, strict=True)):
        if stored and stored != "expert" and not (divided and axis == "mlp"):
            kernel = jax.lax.all_gather(kernel, stored, axis=dimension, tiled=True)
    return kernel
