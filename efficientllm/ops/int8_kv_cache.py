"""Keys or values of a KV cache in int8, one scale a vector: an operand of attention."""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Int8KVCache:
    """Int8 keys or values with one scale a vector: `values * scale`, the scale being the largest magnitude / 127.

    Tokens are rounded independently, so that the state does not depend on how many are written at a time.
    """

    values: jax.Array  # int8 [B, S, ..., K]
    scale: jax.Array  # float32 [B, S, ..., 1]

    @classmethod
    def of(cls, vectors: jax.Array) -> "Int8KVCache":
        """Quantizes vectors `[..., K]`, rounded to nearest."""
        vectors = vectors.astype(jnp.float32)
        scale = jnp.max(jnp.abs(vectors), -1, keepdims=True) / 127
        return cls(jnp.round(vectors / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), scale)


def as_array(cached: jax.Array | Int8KVCache, dtype: jnp.dtype) -> jax.Array:
    """Dequantizes keys or values of a cache of any type to an array of `dtype`."""
    if isinstance(cached, Int8KVCache):
        return (cached.values.astype(jnp.float32) * cached.scale).astype(dtype)
    return cached.astype(dtype)
