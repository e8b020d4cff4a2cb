"""Expert kernels of a mixture of experts, and their products under a mesh.

Over the mesh axis `fsdp` kernels are all-gathered. Over the mesh axis `expert` tokens move to the devices of their
experts and back in two all-to-alls (GShard: Lepikhin et al. 2020, arXiv:2006.16668, Section 3.2), or without a capacity
in rounds of two (`expert_all_to_all`).

Letters as in `dispatch`: n tokens, k experts of a token, r rows of the experts' input.
"""

import functools
import math
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm import sharding
from efficientllm.errors import FieldError
from efficientllm.ffns import dispatch, expert_all_to_all
from efficientllm.ffns.dense import ACTIVATIONS
from efficientllm.ops.grouped_matmul import grouped_matmul, vectors_of_rows
from efficientllm.weights import Axes, Precision, adapted_bias, as_input_sharded, axes, can_shard_inputs, parameter

fan_in_normal = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=0)
AXES = {
    "gate": ("expert", "embed", "mlp"),
    "up": ("expert", "embed", "mlp"),
    "down": ("expert", "mlp", "embed"),
}


class Experts(nn.Module):
    """`num_experts` networks with an activation of `dense.ACTIVATIONS`, such as SwiGLU, and with dispatch.

    `plan(experts_BTk, num_experts, real_BT=...)` returns a `dispatch.Plan`. `kernel` is a registered `grouped_kernel`.
    `round_factor` is the size of a round of `expert_all_to_all` over the fair share of a device.
    """

    num_experts: int
    hidden: int
    precision: Precision
    plan: typing.Callable
    kernel: str
    activation: str = "swiglu"
    use_bias: bool = False
    round_factor: float = 1.25

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, experts_BTk: jax.Array, weights_BTk: jax.Array, real_BT: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """Returns `(the weighted sum of each token's experts, kept [B, T, k], rounds)`.

        `kept` are the kept assignments, None where all are; `rounds` those of `expert_all_to_all`, None without.
        `real_BT` is False for padding; None: no token is padding. Raises UserError where the mesh axis `expert` does
        not divide the experts.
        """
        E, D, F, activation = self.num_experts, x_BTD.shape[-1], self.hidden, ACTIVATIONS[self.activation]
        shapes = {"gate": (E, D, F)} if activation.is_gated else {}
        shapes |= {"up": (E, D, F), "down": (E, F, D)}
        linears = {name: _Linear(shape, AXES[name], self.use_bias, name=name)() for name, shape in shapes.items()}
        fields = {"activation": activation, "plan": self.plan, "precision": self.precision, "kernel": self.kernel}
        compute = functools.partial(_compute, **fields, round_factor=self.round_factor)
        mesh = sharding.current_mesh()
        if mesh is not None and mesh.size > 1:
            _check(mesh, E)
            split = sharding.spec(AXES["down"], shapes["down"], mesh)[AXES["down"].index("mlp")]
            axis_size = sharding.count(mesh, split)
            if not can_shard_inputs(linears["down"].kernel, axis_size):  # `down` is replicated over the hidden width
                compute, split, axis_size = functools.partial(compute, hidden=split), None, 1
            for name, shards in {**dict.fromkeys(linears, 1), "down": axis_size}.items():
                linears[name] = linears[name]._replace(kernel=as_input_sharded(linears[name].kernel, shards))
            compute = _per_device(compute, linears, x_BTD.shape, mesh, split, self.plan is dispatch.dropless)
        return compute(x_BTD, experts_BTk, weights_BTk, linears, real_BT)


class Linears(typing.NamedTuple):
    """A linear map of each expert: kernels `[E, in, out]`, and biases `[E, out]` or None."""

    kernel: typing.Any
    bias: typing.Any = None


class _Linear(nn.Module):
    shape: tuple
    axes: tuple
    use_bias: bool

    @nn.compact
    def __call__(self):
        kernel = parameter(self, "kernel", nn.with_logical_partitioning(fan_in_normal, self.axes), self.shape)
        if not self.use_bias:
            return Linears(kernel)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, _of_bias(self.axes))
        return Linears(kernel, adapted_bias(kernel, self.param("bias", zeros, _of_bias(self.shape))))


def _of_bias(axes):
    """Drops the inputs from the axes, or the shape, of a kernel."""
    experts, _, outputs = axes
    return experts, outputs


def _check(mesh, num_experts):
    axis_size = mesh.shape["expert"]
    if num_experts % axis_size:
        raise FieldError(
            "mesh",
            f"expert = {axis_size} does not divide moe's num_experts = {num_experts}; "
            f"{math.gcd(axis_size, num_experts)} would, or fsdp in place of expert",
        )


def _compute(
    x_BTD,
    experts_BTk,
    weights_BTk,
    linears,
    real_BT,
    *,
    plan,
    round_factor,
    axis_size=1,
    axes=(),
    **network,
):
    """Computes the experts on one device: dispatch, grouped products, and the sum over a token's rows.

    `axis_size` is that of the mesh axis `expert`, `axes` are all axes of the mesh; `linears` are those of this device's
    experts. `network` are the fields of `_networks`.
    """
    k, D, E = experts_BTk.shape[-1], x_BTD.shape[-1], axis_size * linears["up"].kernel.shape[0]
    plan, rounds = plan(experts_BTk, E, real_BT=real_BT), None
    x_rD = dispatch.to_experts(x_BTD.reshape(-1, D), plan)
    weights_r1 = dispatch.weights_of_rows(weights_BTk.reshape(-1, k), plan).astype(x_BTD.dtype)
    networks = functools.partial(_networks, **network)
    if axis_size > 1 and plan.sizes_E is not None:
        where = expert_all_to_all.route(plan.sizes_E, axis_size, len(x_rD))
        places = math.ceil(round_factor * len(x_rD) / axis_size)
        rounds = expert_all_to_all.count_rounds(where, places, axes)
        y_rD = expert_all_to_all.compute_in_rounds(networks, places, (x_rD, weights_r1, linears), where, rounds)
    else:
        x_rD, weights_r1 = (_send(rows, E, axis_size) for rows in (x_rD, weights_r1))
        y_rD = _return(networks(linears, x_rD, weights_r1, plan.sizes_E), E, axis_size)
    y_nD = dispatch.from_experts(y_rD, plan)
    kept_BTk = None if plan.kept_nk is None else plan.kept_nk.reshape(experts_BTk.shape)
    return y_nD.reshape(x_BTD.shape), kept_BTk, rounds


def _networks(linears, x_rD, weights_r1, sizes_E, *, activation, precision, kernel, hidden=None, split=None):
    """Computes the networks of experts of rows that are sorted by expert, times the weights of the rows.

    `hidden` names the mesh axes that shard the hidden width where `down` is replicated. Where devices compute partial
    sums over the mesh axes `split`, the first one adds the bias of `down`.
    """

    def linear(x, name, bias_factor=1):
        y = grouped_matmul(x, linears[name].kernel, sizes_E, precision, kernel)
        if linears[name].bias is None:
            return y
        return y + bias_factor * vectors_of_rows(linears[name].bias.astype(y.dtype), sizes_E, len(y))

    hidden_rF = activation.function(linear(x_rD, "gate" if activation.is_gated else "up"))
    if activation.is_gated:
        hidden_rF = hidden_rF * linear(x_rD, "up")
    # The weights multiply before the last product, so its outputs are not saved for the backward pass.
    hidden_rF = hidden_rF * weights_r1
    if hidden:
        hidden_rF = jax.lax.all_gather(hidden_rF, hidden, axis=1, tiled=True)
    has_bias = split and linears["down"].bias is not None
    return linear(
        hidden_rF, "down", jnp.where(jax.lax.axis_index(split) == 0, weights_r1, 0) if has_bias else weights_r1
    )


def _send(x_rD, num_experts, axis_size):
    """Sends rows to the devices of their experts by an all-to-all; received rows are sorted by expert too."""
    if axis_size == 1:
        return x_rD
    x_ErD = x_rD.reshape(num_experts, -1, x_rD.shape[-1])
    return jax.lax.all_to_all(x_ErD, "expert", 0, 1, tiled=True).reshape(x_rD.shape)


def _return(y_rD, num_experts, axis_size):
    """Returns rows to the devices of their tokens, the inverse of `_send`."""
    if axis_size == 1:
        return y_rD
    y_ErD = y_rD.reshape(num_experts // axis_size, -1, y_rD.shape[-1])
    return jax.lax.all_to_all(y_ErD, "expert", 1, 0, tiled=True).reshape(y_rD.shape)


def _per_device(compute, linears, x_shape, mesh, split, divided):
    """Wraps `compute` in shard_map over the tokens: a shard of each row if `divided`, else whole rows.

    All-gathers this layer's kernels, still quantized, and biases over every mesh axis that shards them but two:

    - The hidden width stays sharded over the mesh axes `split`. Each device computes a partial sum of every expert, and
      a psum adds them. Where a quantized `down` cannot be sharded so, `split` is None and the hidden vectors are
      all-gathered instead.
    - Experts stay sharded over the mesh axis `expert`; tokens are sent to its devices.
    """
    names = {name: _axes(linear, AXES[name]) for name, linear in linears.items()}
    layouts = jax.tree.map(lambda leaf, axes: sharding.spec(axes, leaf.shape, mesh), linears, names)
    tokens = sharding.spec(("batch", "length" if divided else None, None), x_shape, mesh)

    def near(linears, name):
        gather = functools.partial(_gather, divided=name != "down" or split is not None)
        return jax.tree.map(gather, linears[name], names[name], layouts[name])

    def on_device(x_BTD, experts_BTk, weights_BTk, linears, real_BT):
        whole = {name: near(linears, name) for name in linears}
        place = {"axis_size": mesh.shape["expert"], "axes": mesh.axis_names, "split": split}
        y_BTD, kept_BTk, rounds = compute(x_BTD, experts_BTk, weights_BTk, whole, real_BT, **place)
        return (jax.lax.psum(y_BTD, split) if split else y_BTD), kept_BTk, rounds

    specs = (tokens, tokens, tokens, layouts, jax.sharding.PartitionSpec(*tokens[:2]))
    # The backward pass all-gathers again: saved, the gathered kernels of all layers would fill every device.
    on_device = jax.checkpoint(on_device, policy=_not_gathered)
    # Loops whose carries start as constants do not type-check per mesh axis, hence check_vma.
    results = (tokens, tokens, jax.sharding.PartitionSpec())
    return jax.shard_map(on_device, in_specs=specs, out_specs=results, check_vma=False)


def _axes(linear, names):
    return Linears(axes(linear.kernel, names), None if linear.bias is None else Axes(_of_bias(names)))


def _not_gathered(primitive, *_, **__):
    return primitive.name != "all_gather"


def _gather(kernel, axes, layout, divided):
    """All-gathers a kernel over the mesh axes of `layout` but `expert`, and but those of a `divided` hidden width."""
    for dimension, (axis, stored) in enumerate(zip(axes, layout, strict=True)):
        if stored and stored != "expert" and not (divided and axis == "mlp"):
            kernel = jax.lax.all_gather(kernel, stored, axis=dimension, tiled=True)
    return kernel
