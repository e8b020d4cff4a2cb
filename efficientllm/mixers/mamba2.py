"""Mamba-2: state-space duality (SSD), one decay a head, computed in chunks (Dao & Gu 2024, arXiv:2405.21060).

Letters: C inner channels, P channels of a head, n state size of a channel, J groups of heads that share b and c, Q
tokens of a chunk, e merged axes (named where they are made).
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.errors import UserError
from efficientllm.layers import Linear
from efficientllm.mixers import directions
from efficientllm.mixers.base import Context, Mixer, State
from efficientllm.mixers.causal_conv import CausalConv, log_uniform_steps
from efficientllm.ops import ssd
from efficientllm.registry import register
from efficientllm.sharding import constrain
from efficientllm.weights import activation_dtype


@register("mixer", "mamba2", example="mamba2(ssm_head_dim=4, state_dim=16)")
class Mamba2(Mixer, kw_only=True):
    """State-space model with scalar decays: parallel projections, convolutions, SSD, a gate and a norm (Figure 6).

    A block of Mamba-2 has no ffn. The state is the last inputs of the convolutions and a float32 matrix `[P, n]` a
    head, whatever the length. A bidirectional row is convolved and scanned from both ends with the same parameters,
    and the results are added up before the gate.

    Args:
      inner: C; None is twice the model's width.
      ssm_head_dim: P; H is C / P. None is 64, or the largest power of two that divides C where 64 does not.
      state_dim: n.
      num_groups: J.
      conv: taps of the convolution.
      chunk: Q, the chunk size of training and prefill (`ops.ssd`).
      use_bias: adds a bias to the input and output projections.
      conv_bias: adds a bias to the convolutions.
    """

    precision: str
    dim: int
    eps: float
    inner: int = None
    ssm_head_dim: int = None
    state_dim: int = 128
    num_groups: int = 1
    conv: int = 4
    chunk: int = 64
    use_bias: bool = False
    conv_bias: bool = True

    family = "mamba2"
    is_recurrent = True
    saves_products = True
    orders = ("causal", "bidirectional")

    @property
    def channels(self) -> int:
        """C, the inner channels."""
        return self.inner or 2 * self.dim

    @property
    def width(self) -> int:
        """P, the channels of a head."""
        return self.ssm_head_dim or math.gcd(self.channels, 64)

    @property
    def num_heads(self) -> int:
        """H = C / P. Raises UserError where heads or groups do not divide the channels."""
        C, P, J = self.channels, self.width, self.num_groups
        if C % P or (C // P) % J:
            raise UserError(
                f"mamba2: inner = {C} is not made of num_groups = {J} groups of heads of ssm_head_dim = {P}"
            )
        return C // P

    def head_counts(self) -> tuple[int, int]:
        return self.num_heads, self.num_heads

    def hyperparameters(self) -> dict[str, Any]:
        names = ("channels", "width", "state_dim", "num_groups", "conv", "use_bias", "conv_bias", "eps")
        return {name: getattr(self, name) for name in names}

    @nn.compact
    def __call__(self, x_BTD: jax.Array, ctx: Context, state: State | None = None) -> tuple[jax.Array, State | None]:
        B, T, D = x_BTD.shape
        C, H, J, n = self.channels, self.num_heads, self.num_groups, self.state_dim
        tails = {"x": None, "bc": None} if state is None else state["tails"]
        gate_BTC = self._project(x_BTD, "gate", C, "mlp")
        positions_BT = directions.positions(ctx, (B, T))
        x_BTC, tail_x = self._convolve(x_BTD, "x", C, "mlp", ctx, tails["x"])
        bc_BTe, tail_bc = self._convolve(x_BTD, "bc", 2 * J * n, None, ctx, tails["bc"])
        B = x_BTC.shape[0]  # twice the rows where they are read in both directions
        # e: b and c of all groups side by side, 2 J n
        b_BTJn, c_BTJn = (half.reshape(B, T, J, n) for half in jnp.split(bc_BTe, 2, -1))
        step_BTH = directions.split(ctx, self._project(x_BTD, "step", H, None).astype(jnp.float32))
        axes = nn.with_logical_partitioning
        step_BTH = jax.nn.softplus(step_BTH + self.param("step_bias", axes(log_uniform_steps(), (None,)), (H,)))
        A_H = -jnp.exp(self.param("A_log", axes(_log_one_to_h, (None,)), (H,)))
        skip_H = self.param("skip", axes(nn.initializers.ones, (None,)), (H,))
        x_BTHP = constrain(x_BTC.reshape(B, T, H, -1).astype(jnp.float32), "batch", None, "channels", None)
        memory = jnp.zeros((B, H, x_BTHP.shape[-1], n)) if state is None else state["memory"]
        scan = ssd.step if state is not None and T == 1 else ssd.chunked
        y_BTHP, memory = scan(x_BTHP, step_BTH, A_H, b_BTJn, c_BTJn, positions_BT > 0, memory, self.chunk)
        y_BTC = directions.join(ctx, (y_BTHP + skip_H[:, None] * x_BTHP).reshape(B, T, C))
        y_BTC = self._norm(y_BTC * jax.nn.silu(gate_BTC.astype(jnp.float32))).astype(x_BTD.dtype)
        y_BTD = Linear(D, ("mlp", "embed"), self.precision, self.use_bias, name="o")(y_BTC)
        return y_BTD, None if state is None else {"tails": {"x": tail_x, "bc": tail_bc}, "memory": memory}

    def _project(self, x_BTD, name, width, axis):
        y = Linear(width, ("embed", axis), self.precision, self.use_bias, name=name)(x_BTD)
        return constrain(y, "batch", None, axis and "channels")

    def _convolve(self, x_BTD, name, width, axis, ctx, tail):
        conv = CausalConv(self.conv, axis, self.conv_bias, name=f"conv_{name}")
        y = directions.split(ctx, self._project(x_BTD, name, width, axis))
        y, tail = conv(y, directions.positions(ctx, x_BTD.shape[:2]), tail)
        return jax.nn.silu(y).astype(jnp.float32), tail

    def _norm(self, y_BTC):
        """Applies an RMS norm to the channels of each group, in float32."""
        scale_C = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("mlp",)), y_BTC.shape[-1:])
        groups = y_BTC.reshape(*y_BTC.shape[:2], self.num_groups, -1)
        groups = groups * jax.lax.rsqrt(jnp.mean(groups * groups, -1, keepdims=True) + self.eps)
        return groups.reshape(y_BTC.shape) * scale_C

    def init_state(self, batch: int, length: int) -> State:
        """Returns zeros: `tails` `[B, conv - 1, ...]` in the activation dtype, `memory` `[B, H, P, n]` in float32."""
        dtype, before = activation_dtype(self.precision), self.conv - 1
        widths = {"x": self.channels, "bc": 2 * self.num_groups * self.state_dim}
        tails = {name: jnp.zeros((batch, before, width), dtype) for name, width in widths.items()}
        return {"tails": tails, "memory": jnp.zeros((batch, self.num_heads, self.width, self.state_dim))}

    def state_bytes(self, length: int) -> int:
        """Counts the bytes of state of a row, the same for every length: (C + 2 J n) (conv - 1) b + 4 C n."""
        tail = (self.conv - 1) * activation_dtype(self.precision).itemsize
        return (self.channels + 2 * self.num_groups * self.state_dim) * tail + 4 * self.channels * self.state_dim

    def mix_flops(self, length: int, executed: bool = False, order: str = "causal") -> float:
        """Counts the forward FLOPs of the recurrence, 4 C n a token; with `executed` those of `ssd.chunked`."""
        scans = 2 if order == "bidirectional" else 1
        if not executed:
            return 4 * self.channels * self.state_dim * length * scans
        sizes = self.num_heads, self.width, self.state_dim, self.num_groups, self.chunk
        return scans * ssd.chunked_flops(length, *sizes)


def _log_one_to_h(key, shape):
    return jnp.log(jnp.arange(1, shape[0] + 1, dtype=jnp.float32))
