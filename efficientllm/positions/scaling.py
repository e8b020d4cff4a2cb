"""RoPE scaling: rotary frequencies for contexts longer than in training, `rope(scaling="...")`.

The formulas, and the names of the fields but `original_length`, are those of transformers' `rope_parameters`
(`original_max_position_embeddings` there).
"""

import dataclasses
import math
import typing

import jax
import jax.numpy as jnp

from efficientllm.errors import UserError
from efficientllm.registry import register


def plain(base: float, K: int) -> jax.Array:
    """Computes the K/2 unscaled frequencies (RoPE, arXiv:2104.09864, Eq. 15)."""
    return base ** (-jnp.arange(0, K, 2, dtype=jnp.float32) / K)


@register("rope_scaling", "none")
@dataclasses.dataclass(frozen=True)
class Unscaled:
    """No scaling: the frequencies of the base; the base class of RoPE scalings.

    `by_length` is true where frequencies depend on the length of a row. `switches_at` is the length beyond which all
    keys are rotated again, those of a KV cache too.
    """

    by_length: typing.ClassVar[bool] = False
    switches_at: typing.ClassVar[int] = None

    def frequencies(self, base: float, K: int, positions_BT: jax.Array) -> tuple[jax.Array, float]:
        """Returns `(radians a position of each of the K/2 pairs, amplitude of cosine and sine)` for one row."""
        return plain(base, K), 1.0

    def score_scale(self) -> float:
        """Returns the factor on the attention scale, which DeepSeek's models apply."""
        return 1.0


@register("rope_scaling", "linear", example="linear(factor=4.0)")
@dataclasses.dataclass(frozen=True)
class Linear(Unscaled):
    """Position interpolation: positions are divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    factor: float

    def frequencies(self, base: float, K: int, positions_BT: jax.Array) -> tuple[jax.Array, float]:
        return plain(base, K) / self.factor, 1.0


@register("rope_scaling", "dynamic", example="dynamic(factor=4.0, original_length=16)")
@dataclasses.dataclass(frozen=True)
class Dynamic(Unscaled):
    """Dynamic NTK scaling: the base grows with a row's longest position beyond the original length.

    Keys of a KV cache keep the rotation that they were stored with, as in transformers. Beyond the original length
    this is not causal.
    """

    factor: float
    original_length: int

    by_length = True

    def frequencies(self, base: float, K: int, positions_BT: jax.Array) -> tuple[jax.Array, float]:
        if K < 4:
            raise UserError(f"rope scaling dynamic: {K} features of a head turn; it needs 4 or more")
        length = jnp.maximum(jnp.max(positions_BT) + 1, self.original_length).astype(jnp.float32)
        stretch = self.factor * length / self.original_length - (self.factor - 1)
        return plain(base * stretch ** (K / (K - 2)), K), 1.0


@register("rope_scaling", "llama3", example="llama3(factor=8.0, original_length=16)")
@dataclasses.dataclass(frozen=True)
class Llama3(Unscaled):
    """Llama 3.1 scaling: low frequencies are divided by `factor`, high ones kept, those between interpolated."""

    factor: float
    original_length: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self):
        if self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                f"rope scaling llama3: high_freq_factor = {self.high_freq_factor} must be above low_freq_factor = "
                f"{self.low_freq_factor}"
            )

    def frequencies(self, base: float, K: int, positions_BT: jax.Array) -> tuple[jax.Array, float]:
        frequency = plain(base, K)
        turns = self.original_length * frequency / (2 * math.pi)
        unscaled = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        unscaled = jnp.clip(unscaled, 0.0, 1.0)
        return (1 - unscaled) * frequency / self.factor + unscaled * frequency, 1.0


@register(
    "rope_scaling",
    "longrope",
    example="longrope(short_factor=(1.0, 1.1), long_factor=(1.5, 4.0), original_length=16, amplitude=1.2)",
)
@dataclasses.dataclass(frozen=True)
class LongRope(Unscaled):
    """LongRoPE scaling: a divisor for each frequency (Ding et al. 2024, arXiv:2402.13753; Phi-3).

    Rows up to the original length have the divisors `short_factor`, longer rows `long_factor`. `amplitude` is the
    factor on cosine and sine.

    A text that grows beyond the original length is read again with `long_factor`, as in transformers' Phi-3. With
    `keeps_keys` the keys of a KV cache stay as they are, as in transformers' other classes.
    """

    short_factor: tuple
    long_factor: tuple
    original_length: int
    amplitude: float
    keeps_keys: bool = False

    @property
    def by_length(self) -> bool:
        return tuple(self.short_factor) != tuple(self.long_factor)

    @property
    def switches_at(self) -> int | None:
        return self.original_length if self.by_length and not self.keeps_keys else None

    def frequencies(self, base: float, K: int, positions_BT: jax.Array) -> tuple[jax.Array, float]:
        for name in ("short_factor", "long_factor"):
            if len(getattr(self, name)) != K // 2:
                raise UserError(
                    f"rope scaling longrope: {name} has {len(getattr(self, name))} values for {K // 2} pairs of a head"
                )
        is_long = jnp.max(positions_BT) + 1 > self.original_length
        divisor = jnp.where(is_long, jnp.asarray(self.long_factor), jnp.asarray(self.short_factor))
        return plain(base, K) / divisor, self.amplitude


@register("rope_scaling", "yarn", example="yarn(factor=4.0, original_length=16, mscale_all_dim=1.0)")
@dataclasses.dataclass(frozen=True)
class Yarn(Unscaled):
    """YaRN scaling: low frequencies are divided by `factor`, high ones kept (Peng et al. 2023, arXiv:2309.00071).

    Low is a pair that turns less than `beta_slow` times over the original length, high one that turns more than
    `beta_fast` times. The amplitude of cosine and sine grows with `factor`.

    `mscale` and `mscale_all_dim` are unset at 0. Where both are set, their ratio replaces that growth. `mscale_all_dim`
    also multiplies the attention scale of latent attention (DeepSeek-V2, V3).
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    def frequencies(self, base: float, K: int, positions_BT: jax.Array) -> tuple[jax.Array, float]:
        def pair_that_turns(times):
            return K * math.log(self.original_length / (times * 2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(pair_that_turns(self.beta_fast)), 0)
        high = min(math.ceil(pair_that_turns(self.beta_slow)), K - 1)
        stretched = (jnp.arange(K // 2, dtype=jnp.float32) - low) / max(high - low, 1e-3)
        stretched = jnp.clip(stretched, 0.0, 1.0)
        frequency = plain(base, K)
        return stretched * frequency / self.factor + (1 - stretched) * frequency, self._amplitude()

    def _amplitude(self):
        if self.mscale and self.mscale_all_dim:
            return self._growth(self.mscale) / self._growth(self.mscale_all_dim)
        return self._growth(1.0)

    def _growth(self, mscale):
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

    def score_scale(self) -> float:
        return self._growth(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0
