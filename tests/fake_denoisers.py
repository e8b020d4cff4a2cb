"""Small models of the denoisers' interface, for tests of objectives, solvers and sampling."""

import dataclasses
import typing

import jax
import jax.numpy as jnp

from efficientllm.embeds.condition import Condition


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A model of labels whose prediction is a function of (x, levels as [B, 1, 1, 1], labels likewise, params)."""

    reads: typing.ClassVar[str] = "images"
    function: typing.Callable
    side: int = 4
    channels: int = 3
    patch: int = 2
    classes: int = 10
    learned_sigma: bool = False
    aux: tuple = ()

    def row_length(self, length):
        return (self.side // self.patch) ** 2

    @property
    def size(self):
        return self.side, self.side

    def condition_shapes(self):
        return {"labels": jax.ShapeDtypeStruct((), jnp.int32)}

    def null_condition(self, rows):
        return Condition(jnp.full(rows, self.classes))

    def request_states(self, params, condition):
        return None

    def request_axes(self, states):
        return None

    def apply(self, variables, images_BhwC, levels_B, condition, states=None):
        assert images_BhwC.shape[1:] == (*self.size, self.channels)
        assert levels_B.dtype == images_BhwC.dtype == jnp.float32 and condition.labels_B.dtype == jnp.int32
        assert condition.text_BSE is None and condition.pooled_BE is None
        levels, labels = (values[:, None, None, None] for values in (levels_B, condition.labels_B))
        return self.function(images_BhwC, levels, labels, variables["params"]), self.aux


@dataclasses.dataclass(frozen=True)
class Recorded(Fixed):
    """A model whose `aux` holds what it was given and what it predicted."""

    def apply(self, variables, images_BhwC, levels_B, condition, states=None):
        prediction, _ = super().apply(variables, images_BhwC, levels_B, condition)
        inputs = images_BhwC, *(values[:, None, None, None] for values in (levels_B, condition.labels_B))
        return prediction, ({"inputs": inputs, "output": prediction},)


def wave(x, level, label, params):
    """Depends on everything, smoothly and by pixel; twice the channels where the parameters have them."""
    kernel = params["kernel"]
    hidden = jnp.sin(x @ kernel + level / 300 + 0.2 * label)
    return hidden + 0.3 * jnp.roll(hidden, 1, axis=1)


def kernel(channels=3, outputs=3, seed=0):
    """Parameters of `wave`."""
    return {"kernel": 0.5 * jax.random.normal(jax.random.key(seed), (channels, outputs))}


def batch(rows=4, side=4, channels=3, classes=10, seed=0):
    """Pictures with classes, weights and hashes."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "images": jax.random.uniform(keys[0], (rows, side, side, channels), minval=-1, maxval=1),
        "labels": jax.random.randint(keys[1], (rows,), 0, classes),
        "weights": jnp.ones(rows),
        "identity": jax.random.bits(keys[2], (rows,), "uint32"),
    }
