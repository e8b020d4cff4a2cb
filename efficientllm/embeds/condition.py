"""`Condition`, the arrays that a diffusion model is told beside a noise level: classes, or the states of texts."""

import typing
from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp

# The leaves by their names in batches, with the type of their numbers.
LEAVES = {"labels": ("labels_B", jnp.int32), "text": ("text_BSE", jnp.float32), "pooled": ("pooled_BE", jnp.float32)}


@flax.struct.dataclass
class Condition:
    """Condition of the pictures of a batch, one row a picture; a leaf that the model does not read is None.

    Args:
      labels_B: classes, int32; the number of classes is no class.
      text_BSE: states of the tokens of a text, of width E.
      pooled_BE: a vector of the text as a whole, of another width.
    """

    labels_B: jax.Array | None = None
    text_BSE: jax.Array | None = None
    pooled_BE: jax.Array | None = None
    replace: typing.ClassVar[typing.Callable]  # flax.struct makes it: a copy with other values of the fields named

    @classmethod
    def of(cls, leaves: Mapping[str, typing.Any]) -> "Condition":
        """Makes the condition of the leaves of a batch, by their names in `LEAVES`; other names are not read."""
        return cls(**{field: leaves[name] for name, (field, _) in LEAVES.items() if name in leaves})

    @classmethod
    def abstract(cls, shapes: Mapping[str, jax.ShapeDtypeStruct], rows: int) -> "Condition":
        """Makes the abstract condition of `rows` pictures by the shapes of one (`Denoiser.condition_shapes`)."""
        return cls.of({name: jax.ShapeDtypeStruct((rows, *row.shape), row.dtype) for name, row in shapes.items()})

    @property
    def rows(self) -> int:
        """The number of pictures. Raises ValueError for a condition without leaves."""
        lengths = {len(leaf) for leaf in jax.tree.leaves(self)}
        if len(lengths) != 1:
            raise ValueError(f"a condition of {lengths or 'no'} rows: needs leaves, all of as many rows")
        return lengths.pop()

    def __getitem__(self, rows: slice) -> "Condition":
        """Takes the pictures `rows`."""
        return jax.tree.map(lambda leaf: leaf[rows], self)

    def where(self, chosen_B: jax.Array, other: "Condition") -> "Condition":
        """Takes the rows of `other` where `chosen_B` is true."""

        def choose(leaf, of_other):
            return jnp.where(chosen_B.reshape(-1, *(1,) * (leaf.ndim - 1)), of_other, leaf)

        return jax.tree.map(choose, self, other)

    def beside(self, other: "Condition") -> "Condition":
        """Makes neighbours of the rows of both: row 2 i is row i, row 2 i + 1 is row i of `other`."""
        return jax.tree.map(lambda *pair: jnp.stack(pair, 1).reshape(-1, *pair[0].shape[1:]), self, other)
