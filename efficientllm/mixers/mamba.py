"""Mamba: a state-space model whose steps depend on the input (Gu & Dao 2023, arXiv:2312.00752).

Letters: C inner channels, n state size of a channel, R rank of the steps, W taps of the convolution.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.layers import Linear
from efficientllm.mixers import directions
from efficientllm.mixers.base import Context, Mixer, State
from efficientllm.mixers.causal_conv import CausalConv, log_uniform_steps
from efficientllm.ops.selective_scan import selective_scan
from efficientllm.registry import register
from efficientllm.sharding import constrain
from efficientllm.weights import activation_dtype


@register("mixer", "mamba")
class Mamba(Mixer, kw_only=True):
    """Selective state-space model: a causal convolution, a selective scan and a gate (Algorithm 2, Figure 3).

    A block of Mamba has no ffn. The state is the last inputs of the convolution and the float32 state of every channel,
    whatever the length. A bidirectional row is convolved and scanned from both ends with the same parameters, and the
    results are added up before the gate.

    Args:
      inner: C; None is twice the model's width.
      state_dim: n.
      conv: W.
      step_rank: R; None is the model's width / 16, rounded up.
      use_bias: adds a bias to the input and output projections.
      conv_bias: adds a bias to the convolution.
      scan_kernel: `auto` or a registered `scan_kernel`.
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

    family = "mamba"
    is_recurrent = True
    saves_products = True
    orders = ("causal", "bidirectional")
    state_axes = {"tail": (None, "channels"), "memory": ("channels",)}

    @property
    def channels(self) -> int:
        """C, the inner channels."""
        return self.inner or 2 * self.dim

    @property
    def rank(self) -> int:
        """R, the rank of the steps."""
        return self.step_rank or -(-self.dim // 16)

    def hyperparameters(self) -> dict[str, Any]:
        names = ("channels", "state_dim", "conv", "use_bias", "conv_bias")
        return {"step_rank": self.rank} | {name: getattr(self, name) for name in names}

    @nn.compact
    def __call__(self, x_BTD: jax.Array, ctx: Context, state: State | None = None) -> tuple[jax.Array, State | None]:
        C, n, D = self.channels, self.state_dim, x_BTD.shape[-1]
        R = self.rank

        def project(name):
            return Linear(C, ("embed", "mlp"), self.precision, self.use_bias, name=name)

        x_BTC, gate_BTC = (constrain(project(name)(x_BTD), "batch", None, "channels") for name in ("x", "gate"))
        tail = None if state is None else state["tail"]
        x_BTC, positions_BT = directions.split(ctx, x_BTC), directions.positions(ctx, x_BTC.shape[:2])
        x_BTC, tail = CausalConv(self.conv, "mlp", self.conv_bias, name="conv")(x_BTC, positions_BT, tail)
        x_BTC = jax.nn.silu(x_BTC)
        # The input selects the step, the input map b and the output map c of the recurrence
        # h_t = exp(step_t A) h_(t-1) + step_t b_t x_t, y_t = c_t h_t + skip x_t; `keep` resets h at a document's start.
        step_and_maps = Linear(R + 2 * n, ("mlp", None), self.precision, out_dtype=jnp.float32, name="select")(x_BTC)
        step_BTR, b_BTn, c_BTn = jnp.split(step_and_maps, (R, R + n), -1)
        step_BTC = Linear(C, (None, "mlp"), self.precision, out_dtype=jnp.float32, name="step")(step_BTR)
        axes = nn.with_logical_partitioning
        step_bias_C = self.param("step_bias", axes(log_uniform_steps(), ("mlp",)), (C,))
        A_log_Cn = self.param("A_log", axes(_one_to_n, ("mlp", None)), (C, n))
        skip_C = self.param("skip", axes(nn.initializers.ones, ("mlp",)), (C,))
        h_BCn = jnp.zeros((x_BTC.shape[0], C, n)) if state is None else state["memory"]
        x32_BTC = x_BTC.astype(jnp.float32)
        step_BTC = jax.nn.softplus(step_BTC + step_bias_C)
        keep_BT = (positions_BT > 0).astype(jnp.float32)
        y_BTC, h_BCn = selective_scan(
            x32_BTC, step_BTC, -jnp.exp(A_log_Cn), b_BTn, c_BTn, keep_BT, h_BCn, self.scan_kernel
        )
        y_BTC = directions.join(ctx, y_BTC + skip_C * x32_BTC) * jax.nn.silu(gate_BTC.astype(jnp.float32))
        y_BTD = Linear(D, ("mlp", "embed"), self.precision, self.use_bias, name="o")(y_BTC.astype(x_BTD.dtype))
        return y_BTD, None if state is None else {"tail": tail, "memory": h_BCn}

    def init_state(self, batch: int, length: int) -> State:
        """Returns zeros: `tail` `[B, W - 1, C]` in the activation dtype, `memory` `[B, C, n]` in float32."""
        C = self.channels
        tail = jnp.zeros((batch, self.conv - 1, C), activation_dtype(self.precision))
        return {"tail": tail, "memory": jnp.zeros((batch, C, self.state_dim))}

    def state_bytes(self, length: int) -> int:
        """Counts the bytes of state of a row, the same for every length: C ((W - 1) b + 4 n), b bytes a number."""
        tail = (self.conv - 1) * activation_dtype(self.precision).itemsize
        return self.channels * (tail + 4 * self.state_dim)

    def kernel_rows(self, path: str, length: int, order: str = "causal") -> int:
        """Counts a kernel's rows: those that select what the scan does are applied in each direction."""
        directed = order == "bidirectional" and path.endswith(("select/kernel", "step/kernel"))
        return 2 * length if directed else length

    def mix_flops(self, length: int, executed: bool = False, order: str = "causal") -> float:
        """Counts the forward FLOPs of the recurrence: update and read, 2 C n each for a token.

        With `executed` the count is 0: no kernel computes them as matrix products.
        """
        scans = 2 if order == "bidirectional" else 1
        return 0 if executed else 4 * self.channels * self.state_dim * length * scans


def _one_to_n(key, shape):
    """Initializes every channel with log 1..n (S4D-Real, Section 3.6)."""
    return jnp.log(jnp.broadcast_to(jnp.arange(1, shape[1] + 1, dtype=jnp.float32), shape))
