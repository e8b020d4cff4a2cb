"""Sampled pictures of a diffusion model: the same classes and noise in every run, so that runs lie side by side."""

import dataclasses
import typing
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from efficientllm.embeds.condition import Condition
from efficientllm.embeds.patches import Denoiser
from efficientllm.infer.denoise import DiffusionSampler
from efficientllm.infer.offload import OffloadedParams
from efficientllm.infer.pictures import images_to_uint8
from efficientllm.objectives.denoising import Denoising
from efficientllm.registry import build
from efficientllm.solvers.base import Solver
from efficientllm.typing import Config, Params

KEY = 0  # of the noise that samples start from, whatever the seed of a run


class SampleConditions(typing.NamedTuple):
    """The conditions of the pictures of a batch. `negative` is what guidance leads away from, None for no condition."""

    condition: Condition
    negative: Condition | None = None


class PictureRequests(typing.Protocol):
    """Numbered pictures, and what is wanted of each. `seed` is that of their noise."""

    @property
    def count(self) -> int:
        """The number of pictures."""

    @property
    def seed(self) -> int:
        """The seed of the noise that they start from."""

    def wanted(self, numbers_B: np.ndarray) -> SampleConditions:
        """What is wanted of the pictures of these numbers; numbers may be beyond the last."""


@dataclasses.dataclass(frozen=True)
class SpreadClasses:
    """`count` pictures of a model, spread over its classes."""

    model: Denoiser
    count: int
    seed: int = KEY

    def wanted(self, numbers_B: np.ndarray) -> SampleConditions:
        """Classes begin anew after the last picture."""
        return SampleConditions(
            labelled(self.model, spread_labels(self.count, self.model.classes)[numbers_B % self.count])
        )


class States(typing.Protocol):
    """The states of texts."""

    def __getitem__(self, text: str) -> dict[str, np.ndarray]:
        """The leaves of a condition, by their names in batches."""


@dataclasses.dataclass(frozen=True)
class CaptionRequests:
    """`count` pictures of `captions`, of which each has states; with guidance, away from the empty text."""

    captions: Sequence[str]
    states: States
    count: int
    guided: bool
    seed: int = KEY

    def wanted(self, numbers_B: np.ndarray) -> SampleConditions:
        """Captions begin anew after the last picture, and after the last caption."""
        captions = [self.captions[number % self.count % len(self.captions)] for number in numbers_B]
        negative = self._condition([""] * len(captions)) if self.guided else None
        return SampleConditions(self._condition(captions), negative)

    def _condition(self, captions):
        rows = [self.states[caption] for caption in captions]
        return Condition.of({name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]})


def solver_of(infer: Config, objective: Denoising) -> Solver:
    """Builds the solver of `config.infer.solver`, or the objective's own. Raises UserError where it does not fit."""
    solver = build("solver", infer.solver or objective.solver, where="config.infer.solver")
    solver.check(objective)
    return solver


def sampler_of(model: Denoiser, infer: Config, objective: Denoising) -> DiffusionSampler:
    """Builds the sampler of `config.infer`. Raises UserError for a solver or for channels that do not fit."""
    return DiffusionSampler(model, objective, solver_of(infer, objective), infer.guidance, infer.guidance_channels)


def image_shape(model: Denoiser) -> tuple[int, ...]:
    """Returns `(h, w, C)` of what a model samples; a video's begins with its frames."""
    return *model.size, model.channels


def describe_batch(model: Denoiser, rows: int) -> str:
    """Describes a batch of pictures, `4 pictures of 32 x 32 x 3`."""
    return f"{rows} picture{'s' * (rows > 1)} of {' x '.join(map(str, image_shape(model)))}"


def spread_labels(count: int, classes: int) -> np.ndarray:
    """Returns `count` labels, int32, spread evenly over the classes; 0, which is none, where there are no classes."""
    return (np.arange(count) * classes // count).astype(np.int32)


def spread_condition(model: Denoiser, count: int) -> Condition:
    """Returns the condition of `count` pictures of `spread_labels`, which have no text."""
    return labelled(model, spread_labels(count, model.classes))


def labelled(model: Denoiser, labels_B: np.ndarray) -> Condition:
    """Returns the condition of pictures of these classes, where the model reads any; they have no text."""
    null = model.null_condition(len(labels_B))
    return null if null.labels_B is None else null.replace(labels_B=jnp.asarray(labels_B, jnp.int32))


def draw(
    sampler: DiffusionSampler,
    params: Params,
    count: int,
    decode: Callable[[jax.Array], jax.Array] | None = None,
    after_chunk: Callable[[int], typing.Any] | None = None,
) -> np.ndarray:
    """Samples `count` pictures, uint8 `[count, h, w, C]`; `decode` maps latents to pixels in [-1, 1]."""
    condition, shape = spread_condition(sampler.model, count), image_shape(sampler.model)
    x_BhwC = sampler.sample(params, condition, jax.random.key(KEY), shape, after_chunk=after_chunk)
    return images_to_uint8(x_BhwC if decode is None else decode(x_BhwC))


def draw_batches(
    sampler: DiffusionSampler,
    params: Params | OffloadedParams,
    requests: PictureRequests,
    rows: int,
    decode: Callable[[jax.Array], jax.Array] | None = None,
    after_step: Callable[[int], typing.Any] | None = None,
) -> Iterator[np.ndarray]:
    """Yields the pictures of `requests`, uint8, `rows` at a time: one program of a step serves all batches.

    `decode` maps latents to pixels in [-1, 1]. `after_step` is called after every step of a batch; what it raises ends
    the sampling.
    """
    shape, key = image_shape(sampler.model), jax.random.key(requests.seed)
    for first in range(0, requests.count, rows):
        condition, negative = requests.wanted(first + np.arange(rows))
        x_BhwC = sampler.sample(params, condition, key, shape, first, 1, after_step, negative)
        yield images_to_uint8(x_BhwC if decode is None else decode(x_BhwC))[: requests.count - first]
