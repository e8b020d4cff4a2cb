"""Sampling of pictures from a diffusion model: one compiled loop over the steps of a solver, with guidance."""

import typing
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from efficientllm.embeds.condition import Condition
from efficientllm.errors import UserError
from efficientllm.infer.offload import OffloadedParams, on_devices
from efficientllm.objectives.base import Objective
from efficientllm.ops import rematerialization
from efficientllm.sharding import constrain, current_mesh, shapes
from efficientllm.solvers.base import Row, Solver
from efficientllm.typing import Params, PyTree


@flax.struct.dataclass
class Carry:
    """Carry of the loop: the noisy pictures or latents, the solver's memory, and a random key a picture."""

    x_BhwC: jax.Array
    memory: PyTree
    keys_B: jax.Array


@flax.struct.dataclass
class DenoisingInputs:
    """What is wanted of the pictures of a batch, in all steps alike.

    Args:
      condition: that of the rows of a call of the model: with guidance, of each picture and then of its negative.
      states: what the model computes of the condition alone (`Denoiser.request_states`).
    """

    condition: Condition
    states: PyTree


class DiffusionSampler:
    """Samples pictures, or latents of an autoencoder, with `model` and its parameters.

    A picture depends on the key, its index and its condition, not on the pictures beside it nor on the mesh.

    Args:
      model: called as in `objectives.denoising`.
      guidance: weight s of classifier-free guidance `u + s (c - u)` (Ho & Salimans 2022, arXiv:2207.12598), where u is
        predicted for the negative condition. 1 is none, and calls the model with half of the rows.
      guidance_channels: how many of the predicted channels are guided, 0 for all; DiT's reference guides 3 of 4. The
        others, and the variances, are those with the condition.

    Raises UserError for a solver that does not fit the objective, and for more channels than there are.
    """

    def __init__(
        self,
        model: typing.Any,
        objective: Objective,
        solver: Solver,
        guidance: float = 1.0,
        guidance_channels: int = 0,
    ) -> None:
        solver.check(objective)
        if guidance_channels > model.channels:
            raise UserError(
                f"config.infer.guidance_channels = {guidance_channels}: the model predicts {model.channels}; "
                "give no more than those, or 0 for all"
            )
        self.model, self.solver, self.guidance = model, solver, guidance
        self.guided_channels = guidance_channels or model.channels
        tables = solver.tables(objective)
        self.rows: Row = {name: np.asarray(table, np.float32) for name, table in tables.items()}
        self.rows["index"] = np.arange(len(tables["level"]), dtype=np.int32)
        self._begin = jax.jit(self._initial, static_argnums=(1, 2))
        self._request = jax.jit(self._prepare)
        options = rematerialization.compiler_options(current_mesh())
        self._steps = jax.jit(self._scan, donate_argnums=2, compiler_options=options)

    @property
    def steps(self) -> int:
        """Steps of the solver, each with one call of the model."""
        return len(self.rows["index"])

    @property
    def rows_per_image(self) -> int:
        """Rows that a picture has in a call of the model: two with guidance."""
        return 1 if self.guidance == 1 else 2

    def sample(
        self,
        params: Params | OffloadedParams,
        condition: Condition,
        key: jax.Array,
        shape: tuple[int, ...],
        first: int = 0,
        chunk: int = 0,
        after_chunk: Callable[[int], typing.Any] | None = None,
        negative: Condition | None = None,
    ) -> jax.Array:
        """Samples pictures of `shape` (h, w, C), one for each row of `condition`, float32 `[B, h, w, C]`.

        Args:
          first: index of the first picture.
          chunk: steps between two calls of `after_chunk`, at most; 0 for all. Chunks are equal, so one program serves.
          after_chunk: called with the number of finished steps. What it raises ends the sampling.
          negative: the condition that guidance leads away from, such as of a negative prompt; None is the model's null
            condition.
        """
        request = self.request(params, condition, negative)
        carry = self.begin(condition.rows, key, shape, first)
        size = chunk_size(self.steps, chunk)
        for start in range(0, self.steps, size):
            carry = self.advance(params, request, carry, start, size)
            if after_chunk:
                jax.block_until_ready(carry.x_BhwC)
                after_chunk(start + size)
        return carry.x_BhwC

    def begin(self, rows: int, key: jax.Array, shape: tuple[int, ...], first: int = 0) -> Carry:
        """Draws the noise that `rows` pictures of `shape` start from."""
        return self._begin(key, rows, shape, first)

    def request(
        self, params: Params | OffloadedParams, condition: Condition, negative: Condition | None = None
    ) -> DenoisingInputs:
        """Computes what all steps read of the pictures wanted; `negative` as in `sample`."""
        return self._request(on_devices(params), condition, negative)

    def advance(
        self, params: Params | OffloadedParams, request: DenoisingInputs, carry: Carry, start: int, count: int
    ) -> Carry:
        """Takes `count` steps from step `start`. The carry is donated; every `count` compiles a program."""
        return self._steps(on_devices(params), request, carry, self._rows(start, count))

    def trace(self, params: Params, rows: int, shape: tuple[int, ...], count: int | None = None) -> jax.stages.Traced:
        """Traces the first `count` steps, or all, for `rows` pictures of `shape`. The parameters may be abstract."""
        carry = jax.eval_shape(lambda: self._initial(jax.random.key(0), rows, shape, 0))
        carry = _sharded(carry)
        request = self.abstract_request(params, rows)
        return self._steps.trace(params, request, carry, self._rows(0, count or self.steps))

    def trace_request(self, params: Params, rows: int) -> jax.stages.Traced:
        """Traces `request` for `rows` pictures. The parameters may be abstract."""
        condition = _sharded(Condition.abstract(self.model.condition_shapes(), rows))
        return self._request.trace(params, condition, None)

    def abstract_request(self, params: Params, rows: int) -> DenoisingInputs:
        """Returns the `request` for `rows` pictures, abstract; so may the parameters be."""
        condition = Condition.abstract(self.model.condition_shapes(), rows)
        request = jax.eval_shape(self._prepare, params, condition, None)
        axes = self.model.request_axes(request.states)
        return DenoisingInputs(_sharded(request.condition), shapes(request.states, axes))

    def _rows(self, start, count):
        return {name: table[start : start + count] for name, table in self.rows.items()}

    def _initial(self, key, B, shape, first):
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(B))
        x_BhwC = _by_rows(self._noise(keys_B, self.steps, shape))
        return Carry(x_BhwC, self.solver.memory(x_BhwC), keys_B)

    def _noise(self, keys_B, index, shape):
        """Noise of one step; that of the start has the index after the last step's."""
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape))(keys_B)

    def _prepare(self, params, condition, negative):
        if self.guidance != 1:
            # A picture's rows with and without its condition are neighbours: they stay on the device that has it.
            negative = self.model.null_condition(condition.rows) if negative is None else negative
            condition = jax.tree.map(_by_rows, condition.beside(negative))
        return DenoisingInputs(condition, self.model.request_states(params, condition))

    def _scan(self, params, request, carry, rows):
        def step(carry, row):
            x_BhwC, memory, keys_B = carry.x_BhwC, carry.memory, carry.keys_B
            noise_BhwC = self._noise(keys_B, row["index"], x_BhwC.shape[1:]) if self.solver.draws else None
            prediction_Bhwc = self._predict(params, x_BhwC, row["level"], request)
            x_BhwC, memory = self.solver.step(row, x_BhwC, prediction_Bhwc, memory, noise_BhwC)
            return Carry(_by_rows(x_BhwC), memory, keys_B), None

        return jax.lax.scan(step, carry, rows)[0]

    def _predict(self, params, x_BhwC, level, request):
        B, of_request = len(x_BhwC), (request.condition, request.states)
        if self.guidance == 1:
            return self.model.apply({"params": params}, x_BhwC, jnp.full(B, level), *of_request)[0]
        twice_BhwC = _by_rows(jnp.repeat(x_BhwC, 2, 0))
        prediction_Bhwc, _ = self.model.apply({"params": params}, twice_BhwC, jnp.full(2 * B, level), *of_request)
        predictions = prediction_Bhwc.reshape(B, 2, *prediction_Bhwc.shape[1:])
        conditioned, without = predictions[:, 0], predictions[:, 1]
        n = self.guided_channels
        guided = without[..., :n] + self.guidance * (conditioned[..., :n] - without[..., :n])
        return jnp.concatenate([guided, conditioned[..., n:]], -1)


def sample(
    model: typing.Any,
    params: Params,
    objective: Objective,
    solver: Solver,
    condition: Condition,
    key: jax.Array,
    shape: tuple[int, ...],
    guidance: float = 1.0,
    guidance_channels: int = 0,
) -> jax.Array:
    """Samples once, as `DiffusionSampler` does, which keeps its compiled program for the next time."""
    sampler = DiffusionSampler(model, objective, solver, guidance, guidance_channels)
    return sampler.sample(params, condition, key, shape)


def chunk_size(steps: int, most: int) -> int:
    """Returns the largest divisor of `steps` that is at most `most`; all steps for 0."""
    return max(size for size in range(1, (most or steps) + 1) if steps % size == 0)


def _sharded(tree):
    """Abstract arrays whose rows are sharded over the mesh in scope."""
    return shapes(tree, jax.tree.map(lambda leaf: ("batch", *(None,) * (leaf.ndim - 1)), tree))


def _by_rows(x_BhwC):
    return constrain(x_BhwC, "batch", *(None,) * (x_BhwC.ndim - 1))
