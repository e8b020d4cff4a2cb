"""RWKV-7 time mix: linear recurrence with a generalized delta rule (Peng et al. 2025, arXiv:2503.14456, Section 4).

Conventions are those of the authors' code (github.com/BlinkDL/RWKV-LM, RWKV-v7). Letters: n width of a head.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.errors import UserError
from efficientllm.layers import Linear
from efficientllm.mixers.base import Context, Mixer, State
from efficientllm.ops import token_shift
from efficientllm.ops.rwkv_recurrence import Tokens, executed_flops, recur
from efficientllm.registry import register
from efficientllm.sharding import constrain
from efficientllm.weights import activation_dtype

NORM_EPS = 64e-5  # the same for every width of a head
SLOWEST, DECAY = -6.0, -0.606531  # bias of the first channel's decay; log of the fastest decay, -exp(-1/2), as released
# Exponents of i / D in the initial share of the previous token, with the depth factors of the middle layer, 1/2.
SHARES = {"r": 0.1, "w": 0.45, "k": 0.35, "v": 0.35, "a": 0.45, "g": 0.1}


@register("mixer", "rwkv")
class RWKV(Mixer, kw_only=True):
    """RWKV-7 time mix: every head has a matrix memory that a token decays by channel, edits under one key and reads.

    The state is that matrix for each head and the last token's input, whatever the length.

    Values of later layers are interpolated to the first layer's (`v_first`). Layers are stacked, so the first layer has
    these `2 D v_rank + D` parameters too, and nothing reads them.

    Initializers are the authors'. Those that depend on the depth are those of the middle layer.

    Args:
      dim: the model's width, the width of the state.
      head_dim: n; the released models have 64.
      decay_rank, a_rank, v_rank, gate_rank: ranks of the low-rank maps of decays, learning rates, shares of `v_first`
        and gates. None is the rank of the released models: 1.8 D^1/2 (twice), 1.3 D^1/2 and 0.6 D^4/5, rounded to
        multiples of 32. The 0.4B model has a `gate_rank` of 128 where this rule gives 160.
      rwkv_kernel: `auto` or a registered `rwkv_kernel`.

    Raises UserError where `head_dim` does not divide the width.
    """

    dim: int
    head_dim: int
    precision: str
    decay_rank: int = None
    a_rank: int = None
    v_rank: int = None
    gate_rank: int = None
    rwkv_kernel: str = "auto"

    is_recurrent = True
    saves_products = True

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, ctx: Context, state: State | None = None
    ) -> tuple[jax.Array, State | None, dict[str, jax.Array]]:
        B, T, D = x_BTD.shape
        _check_heads(D, self.head_dim)
        shifted_BTD, last_BD = token_shift.shift(x_BTD, ctx.positions_BT, state and state["shift"])
        mixed = {name: self._mix(name, x_BTD, shifted_BTD) for name in SHARES}
        r_BTHn = self._heads(self._project("r", mixed["r"], nn.initializers.orthogonal()))
        k_BTD = self._project("k", mixed["k"], nn.initializers.orthogonal(0.1))
        v_BTD, memo = self._value(mixed["v"], ctx.memo)
        tokens = self._tokens(r_BTHn, k_BTD, self._heads(v_BTD), mixed)
        y_BTHn, memory = recur(tokens, ctx.positions_BT == 0, state and state["memory"], self.rwkv_kernel)
        y_BTHn = _HeadNorm(name="norm")(y_BTHn) + self._bonus(tokens)
        gate_BTD = self._low_rank("gate", self.gate_rank, 0.6 * D**0.8, activation="sigmoid")(mixed["g"])
        y_BTD = (y_BTHn.reshape(B, T, D) * gate_BTD).astype(x_BTD.dtype)
        out = Linear(D, ("heads", "embed"), self.precision, kernel_init=nn.initializers.zeros, name="o")
        return out(y_BTD), state and {"shift": last_BD, "memory": memory}, memo

    def _mix(self, name, x_BTD, shifted_BTD):
        init = nn.with_logical_partitioning(token_shift.share_init(SHARES[name]), ("embed",))
        return token_shift.mix(x_BTD, shifted_BTD, self.param(f"x_{name}", init, x_BTD.shape[-1:]))

    def _project(self, name, x_BTD, init):
        axes = ("embed", "heads")
        return Linear(x_BTD.shape[-1], axes, self.precision, kernel_init=init, name=name)(x_BTD)

    def _heads(self, x_BTD):
        x_BTHn = x_BTD.astype(jnp.float32).reshape(*x_BTD.shape[:2], -1, self.head_dim)
        return constrain(x_BTHn, "batch", None, "channels", None)

    def _low_rank(self, name, rank, published, activation=None, bias_init=None):
        rank = rank or max(32, round(published / 32) * 32)
        return _LowRank(rank, self.precision, activation, bias_init, name=name)

    def _value(self, x_BTD, memo):
        """Returns values, interpolated to the first layer's, and the memo of the first layer's for later layers."""
        v_BTD = self._project("v", x_BTD, nn.initializers.orthogonal())
        first_BTD = jnp.where(memo["v_first_is_set"], memo["v_first"].astype(v_BTD.dtype), v_BTD)
        share = self._low_rank("v_share", self.v_rank, 1.3 * v_BTD.shape[-1] ** 0.5, bias_init=_linear(0.73, -0.4))
        v_BTD = v_BTD + (first_BTD - v_BTD) * jax.nn.sigmoid(share(x_BTD)).astype(v_BTD.dtype)
        return v_BTD, {"v_first": first_BTD.astype(memo["v_first"].dtype), "v_first_is_set": jnp.ones((), bool)}

    def _tokens(self, r_BTHn, k_BTD, v_BTHn, mixed):
        """Computes the inputs of the recurrence: decays, keys, learning rates."""
        D, n = k_BTD.shape[-1], self.head_dim
        rank = 1.8 * D**0.5
        decay = self._low_rank("decay", self.decay_rank, rank, "tanh", _decay_init(n))
        rate = self._low_rank("a", self.a_rank, rank, None, _linear(-0.19, 0.4, zigzag=0.3, head_dim=n))
        a_BTHn = self._heads(jax.nn.sigmoid(rate(mixed["a"])))
        k_BTHn = self._heads(k_BTD)
        kappa_BTHn = k_BTHn * self._per_channel("k_k", _linear(0.71, -0.1), D)
        # Normalized to length one; a zero vector has a zero gradient.
        kappa_BTHn *= jax.lax.rsqrt(jnp.maximum(jnp.sum(kappa_BTHn**2, -1, keepdims=True), 1e-24))
        return Tokens(
            r=r_BTHn,
            log_w=self._heads(DECAY * jax.nn.sigmoid(decay(mixed["w"]))),
            k=k_BTHn * (1 + (a_BTHn - 1) * self._per_channel("k_a", nn.initializers.constant(1.02), D)),
            v=v_BTHn,
            kappa=kappa_BTHn,
            beta=kappa_BTHn * a_BTHn,
        )

    def _bonus(self, tokens):
        """Computes what a token reads of its own key and value, added after the norm of the memory's output."""
        H, n = tokens.r.shape[2:]
        r_k_Hn = self._per_channel("r_k", nn.initializers.constant(-0.04), H * n)
        return jnp.sum(tokens.r * tokens.k * r_k_Hn, -1, keepdims=True) * tokens.v

    def _per_channel(self, name, init, D):
        return self.param(name, nn.with_logical_partitioning(init, ("heads",)), (D,)).reshape(-1, self.head_dim)

    def init_memo(self, batch: int, length: int, dim: int) -> dict[str, jax.Array]:
        """Returns the memo of the first layer: zeros `v_first` `[B, T, D]`, and a flag that it is not set."""
        v_first = jnp.zeros((batch, length, dim), activation_dtype(self.precision))
        return {"v_first": v_first, "v_first_is_set": jnp.zeros((), bool)}

    def init_state(self, batch: int, length: int) -> State:
        """Returns zeros: `shift` `[B, D]` in the activation dtype, `memory` `[B, H, n, n]` in float32."""
        n = self.head_dim
        return {
            "shift": jnp.zeros((batch, self.dim), activation_dtype(self.precision)),
            "memory": jnp.zeros((batch, self.dim // n, n, n), jnp.float32),
        }

    def state_bytes(self, length: int) -> int:
        """Counts the bytes of state of a row, the same for every length: D b + 4 D n, b bytes a number."""
        return self.dim * activation_dtype(self.precision).itemsize + 4 * self.dim * self.head_dim

    def mix_flops(self, length: int, executed: bool = False) -> float:
        """Counts the forward FLOPs of the recurrence for a row of `length` tokens: 8 n^2 for a head and token.

        Reading the memory under a key, removing that value, adding the new pair and reading the output take 2 n^2 each.
        The elementwise decay counts 0. With `executed` the count is that of the kernel in use
        (`ops.rwkv_recurrence.executed_flops`).
        """
        n = self.head_dim
        return self.dim // n * (executed_flops(self.rwkv_kernel, length, n, n) if executed else 8 * length * n * n)


def _check_heads(dim, head_dim):
    if head_dim < 1 or dim % head_dim:
        raise UserError(f"rwkv: head_dim = {head_dim} does not divide the width of the model, {dim}")


class _LowRank(nn.Module):
    """Low-rank map `up(activation(down(x))) + bias` in float32, `[B, T, D]`; no bias without `bias_init`."""

    rank: int
    precision: str
    activation: str
    bias_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x_BTD):
        D = x_BTD.shape[-1]
        down = Linear(self.rank, ("embed", None), self.precision, kernel_init=nn.initializers.zeros, name="down")
        hidden_BTR = down(x_BTD)
        if self.activation:
            hidden_BTR = getattr(jax.nn, self.activation)(hidden_BTR)
        init = nn.initializers.orthogonal(0.1 * max(1, self.rank / D) ** 0.5)
        up = Linear(D, (None, "heads"), self.precision, out_dtype=jnp.float32, kernel_init=init, name="up")
        y_BTD = up(hidden_BTR)
        if self.bias_init is None:
            return y_BTD
        return y_BTD + self.param("bias", nn.with_logical_partitioning(self.bias_init, ("heads",)), (D,))


class _HeadNorm(nn.Module):
    """Layer norm over each head (a group norm), in float32."""

    @nn.compact
    def __call__(self, x_BTHn):
        H, n = x_BTHn.shape[2:]
        half_depth = nn.initializers.constant(0.5**0.7)
        scale = self.param("scale", nn.with_logical_partitioning(half_depth, ("heads",)), (H * n,))
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, ("heads",)), (H * n,))
        centred = x_BTHn - jnp.mean(x_BTHn, -1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + NORM_EPS)
        return normed * scale.reshape(H, n) + bias.reshape(H, n)


def _linear(start, slope, zigzag=0.0, head_dim=1):
    """Returns an initializer: `start` + a line of `slope` over the channels + a signed square over each head."""

    def init(_, shape, dtype=jnp.float32):
        line = jnp.linspace(-0.5, 0.5, shape[0], dtype=dtype)
        return start + slope * line + zigzag * _zigzag(shape[0], head_dim)

    return init


def _decay_init(head_dim):
    def init(_, shape, dtype=jnp.float32):
        ramp = jnp.linspace(0, 1, shape[0], dtype=dtype) ** (1 + 0.5**0.3)
        return SLOWEST - SLOWEST * ramp + 0.5 + 2.5 * _zigzag(shape[0], head_dim)

    return init


def _zigzag(dim, head_dim):
    within = jnp.linspace(-1, 1, head_dim)[jnp.arange(dim) % head_dim]
    return within * jnp.abs(within)
