"""RWKV-7 channel mix: a dense ffn with squared ReLU over a token and the previous token."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.ffns.base import FFN, Context, State
from efficientllm.layers import Linear
from efficientllm.ops import token_shift
from efficientllm.registry import register
from efficientllm.weights import activation_dtype


@register("ffn", "channel_mix")
class ChannelMix(FFN):
    """RWKV-7 channel mix `value(relu(key(x + (previous - x) x_k))^2)` (Peng et al. 2025, arXiv:2503.14456, Section 4).

    The state is the last token's input; `dim` is its width, the model's.

    Initializers are RWKV-LM's. There the shares depend on the depth. Here layers are stacked, so all layers have those
    of the middle one.
    """

    dim: int
    hidden: int
    precision: str

    orders = ("causal",)
    saves_products = True

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, ctx: Context, state: State | None = None
    ) -> tuple[jax.Array, State | None, dict]:
        D = x_BTD.shape[-1]
        init = nn.with_logical_partitioning(token_shift.share_init(0.5**4), ("embed",))
        share_D = self.param("x_k", init, (D,))
        shifted_BTD, last_BD = token_shift.shift(x_BTD, ctx.positions_BT, state and state["shift"])
        key = Linear(
            self.hidden, ("embed", "mlp"), self.precision, kernel_init=nn.initializers.orthogonal(), name="key"
        )
        hidden_BTF = jax.nn.relu(key(token_shift.mix(x_BTD, shifted_BTD, share_D))) ** 2
        value = Linear(D, ("mlp", "embed"), self.precision, kernel_init=nn.initializers.zeros, name="value")
        return value(hidden_BTF), state and {"shift": last_BD}, {}

    def in_block(self, x_BTD: jax.Array, ctx: Context, state: State | None) -> tuple[jax.Array, State | None, dict]:
        return self(x_BTD, ctx, state)

    def init_state(self, batch: int, length: int) -> State:
        """Returns zeros: `shift` `[B, D]` in the activation dtype, the input before the first token."""
        return {"shift": jnp.zeros((batch, self.dim), activation_dtype(self.precision))}

    def state_bytes(self, length: int) -> int:
        """Counts the bytes of state of a row, the same for every length: D b, b bytes a number."""
        return self.dim * activation_dtype(self.precision).itemsize
