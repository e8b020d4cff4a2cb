"""Rotary position embedding (RoPE; Su et al. 2021, arXiv:2104.09864, Eq. 34)."""

import jax
import jax.numpy as jnp
import numpy as np

from efficientllm.errors import FieldError, UserError
from efficientllm.positions.base import Position
from efficientllm.registry import build, register


@register("position", "rope")
class RoPE(Position):
    """Rotary positions: pair i of a head rotates by position x base^(-2i/K).

    Args:
      base: the base of frequencies, the model's.
      fraction: the leading share of each head that is rotated; the rest is unchanged (GPT-NeoX).
      interleaved: whether pairs are (2i, 2i + 1), as in the paper and DeepSeek; otherwise they are (i, i + K/2), as in
        Llama, Qwen and GPT-NeoX.
      scaling: the scaling of frequencies for longer contexts, a `rope_scaling` spec.
      sections: the pairs that rotate by each axis of a token's coordinates, in turn: `(16, 24, 24)` are time, row and
        column in Qwen2.5-VL's M-RoPE. Empty: one axis, the position.
      restart: whether frequencies begin anew with each section, from 1, as if it were a head of its own (Wan, axial
        2-D rotations of vision towers). Otherwise they go on (M-RoPE).
      table: whole positions 0..table - 1 are looked up in a table whose angles are float64, as Wan's are; positions
        beyond it give NaN. 0 computes angles in float32, where position 100 is off by up to 1e-5 radians.
    """

    base: float
    fraction: float = 1.0
    interleaved: bool = False
    scaling: str = "none"
    sections: tuple = ()
    restart: bool = False
    table: int = 0

    acts_on = "heads"

    @property
    def axes(self) -> int:
        """A, the number of axes of a token's coordinates."""
        return max(1, len(self.sections))

    @property
    def max_positions(self) -> int | None:
        """The longest row; None is no limit, as where tokens have coordinates (`check_coordinates`)."""
        return None if self.sections else self.table or None

    @property
    def by_length(self) -> bool:
        return self._scaling().by_length

    @property
    def switches_at(self) -> int | None:
        return self._scaling().switches_at

    def rotate(self, x_BTHK: jax.Array, positions_BT: jax.Array, reach_B: jax.Array | None = None) -> jax.Array:
        """Rotates queries or keys `[B, T, H, K]`. Angles are float32: bfloat16 rounds position 257 to 256.

        `positions_BT` may be coordinates `[B, T, A]`; without the last axis they are the same on all axes. `reach_B` is
        the length of each row, including the tokens of its prompt that are not read yet; None: the length by its
        positions. The rotation of a row does not depend on the length of another.
        """
        # K: the rotated features of a head
        K = int(x_BTHK.shape[-1] * self.fraction)
        if K % 2:
            raise UserError(f"rope turns pairs: {K} of a head's {x_BTHK.shape[-1]} features are not even")
        cos, sin = self._waves(K, positions_BT, reach_B)
        head = x_BTHK[..., :K].astype(jnp.float32)
        first, second = (head[..., ::2], head[..., 1::2]) if self.interleaved else jnp.split(head, 2, axis=-1)
        rotated = (first * cos - second * sin, second * cos + first * sin)
        rotated = jnp.stack(rotated, -1).reshape(head.shape) if self.interleaved else jnp.concatenate(rotated, -1)
        return jnp.concatenate([rotated.astype(x_BTHK.dtype), x_BTHK[..., K:]], -1)

    def check_coordinates(self, coordinates_TA: np.ndarray) -> None:
        if self.table and coordinates_TA.max() >= self.table:
            most = int(coordinates_TA.max())
            raise FieldError("position", f"table = {self.table}: a token is at {most}; give it at least {most + 1}")

    def _waves(self, K, positions_BT, reach_B):
        """Returns the cosine and the sine of each pair's angle, times the amplitude, `[B, T, 1, K / 2]`."""
        if self.table:
            return self._looked_up(K, positions_BT)
        if self.sections:
            frequency, amplitude, positions_BT1K = self._sectioned(K, positions_BT)
        else:
            frequency, amplitude = self._frequencies(K, positions_BT, reach_B)
            positions_BT1K = positions_BT[:, :, None, None]
        angle = positions_BT1K.astype(jnp.float32) * frequency
        return jnp.cos(angle) * amplitude, jnp.sin(angle) * amplitude

    def _looked_up(self, K, coordinates):
        """`_waves` by rows of tables that the host computes in float64."""
        if self.scaling != "none":
            raise FieldError("position", f"table = {self.table} does not go with scaling = {self.scaling!r}; take one")
        sections = self.sections or (K // 2,)
        if self.sections:
            self._check_sections(K, coordinates)
        widths = [2 * pairs for pairs in sections] if self.restart else [K]
        frequency_K = np.concatenate([self.base ** (-np.arange(0, width, 2) / width) for width in widths])
        angle_NK = np.arange(self.table)[:, None] * frequency_K
        of_axes = np.split(angle_NK, np.cumsum(sections)[:-1], 1)
        if coordinates.ndim == 2:
            coordinates = jnp.broadcast_to(coordinates[..., None], (*coordinates.shape, len(sections)))

        def look_up(wave):
            rows = [
                jnp.take(wave(angle).astype(np.float32), coordinates[..., axis], axis=0, mode="fill")
                for axis, angle in enumerate(of_axes)
            ]
            return jnp.concatenate(rows, -1)[:, :, None]

        return look_up(np.cos), look_up(np.sin)

    def _frequencies(self, K, positions_BT, reach_B):
        """Returns frequencies `[K / 2]`, `[B, 1, 1, K / 2]` where they depend on a row's length, and the amplitude."""
        scaling = self._scaling()
        if not scaling.by_length:
            return scaling.frequencies(self.base, K, positions_BT)
        reach_B = jnp.max(positions_BT, 1) + 1 if reach_B is None else reach_B
        _, amplitude = scaling.frequencies(self.base, K, positions_BT)
        frequency_BK = jax.vmap(lambda reach: scaling.frequencies(self.base, K, reach - 1)[0])(reach_B)
        return frequency_BK[:, None, None], amplitude

    def _sectioned(self, K, coordinates):
        """Returns frequencies `[K / 2]`, the amplitude, and the coordinate of each pair, `[B, T, 1, 1 or K / 2]`."""
        self._check_sections(K, coordinates)
        widths = [2 * pairs for pairs in self.sections] if self.restart else [K]
        scaled = [self._scaling().frequencies(self.base, width, coordinates) for width in widths]
        frequency, amplitude = jnp.concatenate([frequency for frequency, _ in scaled]), scaled[0][1]
        if coordinates.ndim == 2:
            return frequency, amplitude, coordinates[:, :, None, None]
        of_pairs = [
            jnp.broadcast_to(coordinates[..., axis, None], (*coordinates.shape[:2], pairs))
            for axis, pairs in enumerate(self.sections)
        ]
        return frequency, amplitude, jnp.concatenate(of_pairs, -1)[:, :, None]

    def _check_sections(self, K, coordinates):
        problem = None
        if 2 * sum(self.sections) != K:
            problem = f"are {sum(self.sections)} pairs; {K // 2} pairs of a head rotate"
        elif coordinates.ndim == 3 and coordinates.shape[-1] != self.axes:
            problem = f"are of {self.axes} axes; tokens have {coordinates.shape[-1]}"
        elif self.by_length:
            problem = f"do not go with scaling = {self.scaling!r}, which depends on the length of a row; take another"
        if problem:
            raise FieldError("position", f"sections = {self.sections} {problem}")

    def score_scale(self) -> float:
        return self._scaling().score_scale()

    def _scaling(self):
        return build("rope_scaling", self.scaling, where="rope scaling")
