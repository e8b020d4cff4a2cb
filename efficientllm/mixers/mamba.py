"""Mamba: a state-space model whose steps depend on the input (Gu & Dao 2023, arXiv:2312.00752).

Letters: I inner channels, N state of a channel, R rank of the steps, W taps of the convolution.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.layers import Linear
from efficientllm.mixers.conv import CausalConv, log_uniform_steps
from efficientllm.mixers.selective_scan import selective_scan
from efficientllm.registry import register
from efficientllm.sharding import constrain
from efficientllm.weights import activation_dtype


@register("mixer", "mamba")
class Mamba(nn.Module, kw_only=True):
    """Algorithm 2 in the block of Figure 3: a convolution, a selective scan, a gate. Its block has no ffn.

    Args:
      inner: I; None is twice the model's width.
      state_dim: N.
      conv: W.
      step_rank: R; None is the model's width / 16, rounded up.
      use_bias: of the projections in and out; `conv_bias`: of the convolution.
      scan_kernel: `auto` or a registered `scan_kernel`.

    State is the convolution's last inputs and the float32 state of every channel, whatever the length.
    """

    precision: str
    dim: int
    inner: int = None
    state_dim: int = 16
    conv: int = 4
    step_rank: int = None
    use_bias: bool = False
    conv_bias: bool = True
    scan_kernel: str = "auto"

    @property
    def channels(self):
        return self.inner or 2 * self.dim

    @nn.compact
    def __call__(self, x_BTD, ctx, state=None):
        I, N, D = self.channels, self.state_dim, x_BTD.shape[-1]
        R = self.step_rank or -(-D // 16)
        project = lambda name: Linear(I, ("embed", "mlp"), self.precision, self.use_bias, name=name)  # noqa: E731
        x_BTI, gate_BTI = (constrain(project(name)(x_BTD), "batch", None, "mlp") for name in ("x", "gate"))
        tail = None if state is None else state["tail"]
        x_BTI, tail = CausalConv(self.conv, "mlp", self.conv_bias, name="conv")(x_BTI, ctx.positions_BT, tail)
        x_BTI = jax.nn.silu(x_BTI)
        chosen = Linear(R + 2 * N, ("mlp", None), self.precision, out_dtype=jnp.float32, name="select")(x_BTI)
        step_BTR, b_BTN, c_BTN = jnp.split(chosen, (R, R + N), -1)
        step_BTI = Linear(I, (None, "mlp"), self.precision, out_dtype=jnp.float32, name="step")(step_BTR)
        axes = nn.with_logical_partitioning
        step_bias_I = self.param("step_bias", axes(log_uniform_steps(), ("mlp",)), (I,))
        A_log_IN = self.param("A_log", axes(_one_to_n, ("mlp", None)), (I, N))
        skip_I = self.param("skip", axes(nn.initializers.ones, ("mlp",)), (I,))
        h_BIN = jnp.zeros((x_BTD.shape[0], I, N)) if state is None else state["memory"]
        x32_BTI = x_BTI.astype(jnp.float32)
        step_BTI = jax.nn.softplus(step_BTI + step_bias_I)
        keep_BT = (ctx.positions_BT > 0).astype(jnp.float32)
        y_BTI, h_BIN = selective_scan(
            x32_BTI, step_BTI, -jnp.exp(A_log_IN), b_BTN, c_BTN, keep_BT, h_BIN, self.scan_kernel
        )
        y_BTI = (y_BTI + skip_I * x32_BTI) * jax.nn.silu(gate_BTI.astype(jnp.float32))
        y_BTD = Linear(D, ("mlp", "embed"), self.precision, self.use_bias, name="o")(y_BTI.astype(x_BTD.dtype))
        return y_BTD, None if state is None else {"tail": tail, "memory": h_BIN}

    def init_state(self, batch, length):
        """Zeros: tail `[B, W - 1, I]` in the activation dtype, memory `[B, I, N]` in float32."""
        I = self.channels
        tail = jnp.zeros((batch, self.conv - 1, I), activation_dtype(self.precision))
        return {"tail": tail, "memory": jnp.zeros((batch, I, self.state_dim))}

    def state_bytes(self, length):
        """Bytes of state a row holds, the same for every length: I ((W - 1) b + 4 N)."""
        tail = (self.conv - 1) * activation_dtype(self.precision).itemsize
        return self.channels * (tail + 4 * self.state_dim)

    def mix_flops(self, length, executed=False):
        """FLOPs of a row beyond the kernels': the recurrence's update and read, 2 I N each; none is a matrix product,
        so none of it is `executed`."""
        return 0 if executed else 4 * self.channels * self.state_dim * length


def _one_to_n(key, shape):
    """log 1..N in every channel (the real part of S4D, Section 3.6)."""
    return jnp.log(jnp.broadcast_to(jnp.arange(1, shape[1] + 1, dtype=jnp.float32), shape))
