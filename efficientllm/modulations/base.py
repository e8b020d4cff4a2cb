"""Protocol of a modulation: what a conditioning vector, or a constant, does to the branches of a block."""

import typing

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.errors import FieldError
from efficientllm.layers import Linear
from efficientllm.ops.attention import Context
from efficientllm.sharding import constrain

Branches = tuple[bool, ...]
BOTH: Branches = (True, True)  # a mixer and an ffn


class ConditionVectors(nn.Module):
    """Linear map of the SiLU of a conditioning vector to `count` vectors, `[B, D] -> float32 [B, count, dim]`.

    It starts at zero. Its rows are images, not tokens.
    """

    count: int
    dim: int
    precision: str

    @nn.compact
    def __call__(self, condition_BD: jax.Array) -> jax.Array:
        zeros, features = nn.initializers.zeros, self.count * self.dim
        linear = Linear(features, ("embed", "mlp"), self.precision, True, jnp.float32, zeros)
        nn.share_scope(self, linear)
        vectors = linear(jax.nn.silu(condition_BD.astype(jnp.float32)))
        return constrain(vectors, "batch", None).reshape(-1, self.count, self.dim)


class Affine(typing.NamedTuple):
    """Modulation of one branch: float32 arrays `[B or 1, 1, D]`, None where it does nothing."""

    shift: jax.Array | None = None
    scale: jax.Array | None = None
    gate: jax.Array | None = None

    def modulate(self, normed_BTD: jax.Array) -> jax.Array:
        """Computes `normed * (1 + scale) + shift`, in float32, as the branch's input."""
        y_BTD = normed_BTD
        if self.scale is not None:
            y_BTD = y_BTD.astype(jnp.float32) * (1 + self.scale)
        if self.shift is not None:
            y_BTD = y_BTD.astype(jnp.float32) + self.shift
        return y_BTD.astype(normed_BTD.dtype)

    def add(self, x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
        """Computes `x + gate * y`, in float32: the branch's output `y` added to the residual stream `x`."""
        if self.gate is None:
            return x_BTD + y_BTD
        return (x_BTD.astype(jnp.float32) + self.gate * y_BTD.astype(jnp.float32)).astype(x_BTD.dtype)


class Modulation(nn.Module):
    """Base class of modulations: a flax module registered as ("modulation", name). A spec sets its fields.

    A block calls it once. `project` is called once for all blocks, with parameters that they share.
    """

    def __call__(self, ctx: Context, dim: int, branches: Branches = BOTH) -> tuple[Affine, ...]:
        """Returns the modulation of each branch of a block, for a model of width `dim`.

        The branches are a mixer's, the ffn's, and then those of further mixers that are parallel to the first. Each is
        True where the conditioning vector acts on it; for others a modulation by the vector has no parameters.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no __call__(ctx, dim, branches)")

    def project(self, condition_BD: jax.Array) -> jax.Array:
        """Maps the conditioning vector of an image to the `ctx.condition_BD` that blocks read."""
        return condition_BD

    @nn.compact
    def final(self, condition_BD: jax.Array, precision: str) -> Affine:
        """Returns shift and scale of what the end of the model reads: two vectors of `condition_BD`, from zero on."""
        vectors = ConditionVectors(2, condition_BD.shape[-1], precision)
        nn.share_scope(self, vectors)
        shift_scale = vectors(condition_BD)
        return Affine(shift=shift_scale[:, :1], scale=shift_scale[:, 1:])

    def condition(self, ctx: Context) -> jax.Array:
        """Returns `ctx.condition_BD`. Raises FieldError without one."""
        if ctx.condition_BD is None:
            raise FieldError("modulation", "needs a conditioning vector, which this model has not; take 'plain'")
        return ctx.condition_BD
