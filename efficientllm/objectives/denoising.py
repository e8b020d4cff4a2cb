"""Base of the objectives of diffusion models: noise, levels, dropped conditions of a step; fixed ones for evaluation.

A model is anything whose `apply({"params": params}, images_BhwC, levels_B, condition)` returns
`(prediction_Bhwc float32, aux)`; it says what it reads of a `Condition`, as `embeds.patches.Denoiser` does. Shape
letters: h and w are the height and the width of a picture, C its channels, c those of the prediction, L the fixed noise
levels of the evaluation.
"""

import dataclasses
import functools
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np

from efficientllm.embeds.condition import Condition
from efficientllm.errors import FieldError
from efficientllm.objectives.base import Losses, Metrics, Objective, with_router_losses
from efficientllm.registry import build
from efficientllm.sharding import constrain
from efficientllm.typing import Batch, Params

LEVELS = 8  # held-out pictures are evaluated at k / 8 of the range of noise levels, k = 1..7
LEVEL_LOSSES = tuple(f"eval_loss_level_{k}" for k in range(1, LEVELS))
PICTURES = ("images", "logvar")  # the arrays of a batch that are as large as pictures
DTYPES = {"images": jnp.float32, "logvar": jnp.float32, "weights": jnp.float32, "identity": jnp.uint32}
LATENTS = 7  # of the key that latents are drawn from; the others are split off
Terms = dict[str, jax.Array]  # losses of each picture, `[B]`, by their name in `Losses`


@dataclasses.dataclass(frozen=True)
class Denoising(Objective):
    """An objective of noisy pictures. Derived classes define the noise and the loss.

    A `time` is the diffusion's own: the index of a step, or sigma. A `level` is what the model is given for it.

    label_dropout:  share of the pictures of a step whose condition is replaced by none, for guidance. Captions are
                    replaced by the empty text where batches are made (`data.images.ImageData`), classes here.
    autoencoder:    whose latents the pictures are, `config.autoencoder`. A batch then has the means of their posteriors
                    and `logvar`; each step draws new latents from them, and the evaluation takes the means.
    """

    reads: typing.ClassVar[str] = "images"
    units: typing.ClassVar[dict[str, str]] = dict.fromkeys(("eval_loss", *LEVEL_LOSSES), "1")
    evaluated_on: typing.ClassVar[str] = "held-out pictures"
    # The solver of samples, unless `config.infer.solver` names another.
    solver: typing.ClassVar[str] = ""
    counted: typing.ClassVar[str] = "images"
    likelihood_name: typing.ClassVar[str] = "likelihood a pixel of held-out noise"

    label_dropout: float = 0.1
    autoencoder: str = "pixels"

    @functools.cached_property
    def encoder(self) -> typing.Any:
        """The autoencoder; None where a model sees pixels."""
        encoder = build("autoencoder", self.autoencoder, where="config.autoencoder")
        return None if encoder.channels is None else encoder

    def axes(self, model: typing.Any) -> dict[str, tuple[str | None, ...]]:
        return {name: (None,) * len(row.shape) for name, row in self.row_shapes(model, 0).items()}

    def draw_times(self, key: jax.Array, rows: int) -> jax.Array:
        """Draws the time of each picture of a training step."""
        raise NotImplementedError(f"{type(self).__name__} defines no draw_times(key, rows)")

    def held_out_times(self) -> np.ndarray:
        """Returns the fixed times of the evaluation, `[L]`."""
        raise NotImplementedError(f"{type(self).__name__} defines no held_out_times()")

    def levels(self, times_B: jax.Array) -> jax.Array:
        """Converts times to what the model is given, float32."""
        raise NotImplementedError(f"{type(self).__name__} defines no levels(times_B)")

    def add_noise(self, images_BhwC: jax.Array, noise_BhwC: jax.Array, times_B: jax.Array) -> jax.Array:
        """Mixes pictures and noise as they are at `times_B`."""
        raise NotImplementedError(f"{type(self).__name__} defines no add_noise(images_BhwC, noise_BhwC, times_B)")

    def training_losses(
        self, prediction_Bhwc: jax.Array, images_BhwC: jax.Array, noise_BhwC: jax.Array, times_B: jax.Array
    ) -> jax.Array:
        """Computes the loss of each picture, `[B]`."""
        raise NotImplementedError(f"{type(self).__name__} defines no training_losses(prediction, images, noise, times)")

    def held_out_losses(
        self, prediction_Bhwc: jax.Array, images_BhwC: jax.Array, noise_BhwC: jax.Array, times_B: jax.Array
    ) -> Terms:
        """Computes the unweighted losses of each picture; `eval_loss` is the first of them."""
        raise NotImplementedError(f"{type(self).__name__} defines no held_out_losses(prediction, images, noise, times)")

    def row_shapes(self, model: typing.Any, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns a picture, its weight (0 for padding), the hash of its content, and what conditions the model."""
        shapes = dict.fromkeys(PICTURES, (*model.size, model.channels))
        names = [name for name in DTYPES if name != "logvar" or self.encoder is not None]
        rows = {name: jax.ShapeDtypeStruct(shapes.get(name, ()), DTYPES[name]) for name in names}
        return rows | model.condition_shapes()

    def totals(self, batch: Batch, accumulate: int) -> jax.Array:
        """Computes the mean weight of a micro-batch."""
        return jnp.sum(batch["weights"]) / accumulate

    def counts(self, model: typing.Any, batch: Batch) -> dict[str, jax.Array]:
        """Counts pictures, and the patches that they are made of."""
        samples = jnp.sum(batch["weights"] > 0)
        return {"tokens": samples * model.row_length(0), "samples": samples}

    def loss(
        self, model: typing.Any, params: Params, batch: Batch, key: jax.Array, totals: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Computes the mean loss of the pictures at random times, plus the router losses.

        Everything is drawn with the shape of the whole batch, so it is the same on any mesh.
        """
        images_BhwC, weights_B = self._images(batch, jax.random.fold_in(key, LATENTS)), batch["weights"]
        times_key, noise_key, labels_key = jax.random.split(key, 3)
        times_B = self.draw_times(times_key, len(images_BhwC))
        noise_BhwC = _by_rows(jax.random.normal(noise_key, images_BhwC.shape))
        dropped_B = jax.random.bernoulli(labels_key, self.label_dropout, (len(images_BhwC),))
        condition = Condition.of(batch)
        if condition.labels_B is not None:
            condition = condition.where(dropped_B, model.null_condition(len(images_BhwC)))
        prediction_Bhwc, aux = self._predict(model, params, images_BhwC, noise_BhwC, times_B, condition)
        with jax.named_scope("loss"):
            losses_B = self.training_losses(prediction_Bhwc, images_BhwC, noise_BhwC, times_B)
        total = jnp.where(totals > 0, totals, 1.0)
        share = jnp.sum(weights_B) / total
        aux = jax.tree.map(lambda leaf: leaf * share, aux)
        return with_router_losses(jnp.sum(losses_B * weights_B) / total, aux)

    def _images(self, batch, key):
        """The pictures of a batch as the model sees them: pixels, or scaled latents, drawn with a key."""
        if self.encoder is None:
            return batch["images"]
        return self.encoder.sample(batch["images"], batch["logvar"], key)

    def _predict(self, model, params, images_BhwC, noise_BhwC, times_B, condition):
        noisy_BhwC = self.add_noise(images_BhwC, noise_BhwC, times_B)
        return model.apply({"params": params}, noisy_BhwC, self.levels(times_B), condition)

    def held_out_sums(self, model: typing.Any, params: Params, batch: Batch, table: typing.Any) -> tuple:
        """Computes `(sums over pictures of each loss, [L] each, and the number of pictures)`.

        The noise of a picture is that of its content, and the same at every level: variants are compared in pairs.
        """
        images_BhwC, weights_B = self._images(batch, None), batch["weights"]
        noise_BhwC = _by_rows(fixed_noise(batch["identity"], images_BhwC.shape[1:]))
        condition = Condition.of(batch)

        def at(time):
            times_B = jnp.full(len(images_BhwC), time)
            prediction_Bhwc, _ = self._predict(model, params, images_BhwC, noise_BhwC, times_B, condition)
            losses = self.held_out_losses(prediction_Bhwc, images_BhwC, noise_BhwC, times_B)
            return tuple(jnp.sum(losses_B * weights_B) for losses_B in losses.values())

        return *jax.lax.map(at, jnp.asarray(self.held_out_times())), jnp.sum(weights_B)

    def held_out(self, sums: list[tuple]) -> Losses:
        """Returns the mean of each loss over pictures and levels, and `eval_loss` of each level."""
        columns = [np.sum(np.asarray(column, np.float64), 0) for column in zip(*sums, strict=True)]
        if not columns or not columns[-1]:
            raise FieldError("batches", "none of the held-out rows is a picture; give the data more of them")
        *means, pictures = columns
        names = ("eval_loss", *(name for name in self.units if name not in ("eval_loss", *LEVEL_LOSSES)))
        losses = {name: float(np.mean(mean_L / pictures)) for name, mean_L in zip(names, means, strict=False)}
        losses |= dict(zip(LEVEL_LOSSES, (means[0] / pictures).tolist(), strict=True))
        return Losses(losses, {"eval_loss": [(float(np.mean(terms[0])), float(terms[-1])) for terms in sums]})

    def likelihood(self, loss: float) -> float:
        """Returns `exp(-loss / 2)` of a mean square error, for a normal of variance 1 around the prediction.

        It is relative to that of an exact prediction, which has 1.
        """
        return math.exp(-loss / 2)


def fixed_noise(identity_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws the held-out noise of pictures of `shape` by the hashes of their content, float32 `[B, *shape]`."""
    keys_B = jax.vmap(lambda identity: jax.random.fold_in(jax.random.key(0), identity))(identity_B)
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys_B)


def per_picture(values_B: jax.Array, axes: int) -> jax.Array:
    """Gives one number a picture the axes of pictures, of which there are 4, `[B] -> [B, 1, 1, 1]`, or of clips, 5."""
    return values_B.reshape(-1, *(1,) * (axes - 1))


def mean_square(difference_BhwC: jax.Array) -> jax.Array:
    """Computes the mean square over the pixels and channels of each picture, `[B]`."""
    return jnp.mean(jnp.square(difference_BhwC), tuple(range(1, difference_BhwC.ndim)))


def _by_rows(x_BhwC):
    return constrain(x_BhwC, "batch", *(None,) * (x_BhwC.ndim - 1))
