"""Short depthwise causal convolution, which state-space mixers apply before their scan."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class CausalConv(nn.Module):
    """Depthwise causal convolution `y_t = sum over w of taps[w] * x_(t - width + 1 + w)` within a document.

    It is computed by shifts and sums: a filter has a handful of taps. Letters: C channels, W taps.
    """

    width: int
    axis: str
    use_bias: bool = True

    @nn.compact
    def __call__(
        self, x_BTC: jax.Array, positions_BT: jax.Array, tail_BWC: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns `(y_BTC, tail)`. A tail `[B, W - 1, C]` holds the inputs before the row; None is zeros."""
        B, T, C = x_BTC.shape
        reach = self.width - 1
        init = nn.with_logical_partitioning(_uniform(self.width**-0.5), (None, self.axis))
        taps_WC = self.param("taps", init, (self.width, C)).astype(x_BTC.dtype)
        tail_BWC = jnp.zeros((B, reach, C), x_BTC.dtype) if tail_BWC is None else tail_BWC
        padded = jnp.concatenate([tail_BWC.astype(x_BTC.dtype), x_BTC], 1)
        y_BTC = jnp.zeros_like(x_BTC)
        for tap in range(self.width):
            inside_BT1 = positions_BT[..., None] >= reach - tap
            y_BTC = y_BTC + jnp.where(inside_BT1, padded[:, tap : tap + T], 0) * taps_WC[tap]
        if self.use_bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, (self.axis,))
            y_BTC = y_BTC + self.param("bias", zeros, (C,)).astype(x_BTC.dtype)
        return y_BTC, padded[:, T:]


def _uniform(bound):
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def log_uniform_steps(low: float = 1e-3, high: float = 0.1) -> nn.initializers.Initializer:
    """Returns an initializer of step biases: their softplus is log-uniform in `[low, high]` (arXiv:2312.00752, 3.6)."""

    def init(key, shape):
        step = jnp.exp(jax.random.uniform(key, shape) * (jnp.log(high) - jnp.log(low)) + jnp.log(low))
        return step + jnp.log(-jnp.expm1(-step))

    return init
