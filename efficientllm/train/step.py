"""Pure functions of training: TrainState, gradients, train step, and their jitted forms with shardings."""

import functools
import typing
from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from efficientllm import model as models
from efficientllm import sharding
from efficientllm.adapters.base import Method, join, split, tuned
from efficientllm.adapters.freeze import Full
from efficientllm.adapters.lora import seeded
from efficientllm.model import Backbone
from efficientllm.objectives.base import Objective
from efficientllm.objectives.next_token import NEXT_TOKEN
from efficientllm.ops import rematerialization
from efficientllm.optim import from_config
from efficientllm.typing import Batch, Config, Mesh, Params, PyTree

FULL = Full()


@flax.struct.dataclass
class TrainState:
    """State of training.

    step:    number of finished steps.
    params:  trainable parameters, with None in place of frozen ones.
    frozen:  frozen parameters, with None in place of trainable ones.
    key:     random key data; a step folds `step` into it, so it never changes.
    """

    step: jax.Array
    params: dict
    opt_state: tuple
    key: jax.Array
    frozen: dict

    @property
    def all_params(self) -> Params:
        """Trainable and frozen parameters in one tree."""
        return join(self.params, self.frozen)

    @property
    def eval_params(self) -> Params:
        """The parameters of evaluation, samples and exports."""
        return self.all_params


@flax.struct.dataclass
class AveragedState(TrainState):
    """State of training with `ema`, an exponential moving average of `params` (`config.train.ema`)."""

    ema: dict

    @property
    def eval_params(self) -> Params:
        return join(self.ema, self.frozen)


def create(
    lm: Backbone, train: Config, method: Method, seed: int, boxed: PyTree, params: PyTree, form: str = "float32"
) -> TrainState:
    """Creates the boxed TrainState of boxed `params`; `boxed` is the tree without adapters, whose axes they take.

    Kernels are quantized to `form` first, then the tuning method wraps them in its adapters.
    """
    key = jax.random.key(seed)
    trainable, frozen = tuned(method, lm, boxed, params, jax.random.fold_in(key, 1), form)
    opt_state = from_config.optimizer(train, nn.unbox(trainable), method.rates).init(trainable)
    state = TrainState(jnp.zeros((), jnp.int32), trainable, opt_state, jax.random.key_data(key), frozen)
    if not train.ema:
        return state
    # A copy: the step donates its state, and one array cannot be donated twice.
    return AveragedState(**vars(state), ema=jax.tree.map(jnp.copy, trainable))


def init_state(
    lm: Backbone, train: Config, seed: int, length: int, method: Method = FULL, form: str = "float32"
) -> Callable[[], TrainState]:
    """A function of no arguments that creates the boxed TrainState of a new model."""

    def init():
        boxed = models.init_params(lm, jax.random.key(seed), length)
        return create(lm, train, method, seed, boxed, boxed, form)

    return init


def abstract_state(
    lm: Backbone, config: Config, boxed: PyTree, method: Method, mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """`(abstract TrainState with shardings, the shardings alone)` of a run of `config` on `mesh`.

    `boxed` are the model's abstract parameters.
    """
    with jax.set_mesh(mesh):
        state = jax.eval_shape(
            lambda params: create(lm, config.train, method, config.seed, params, params, config.quant), boxed
        )
    return sharding.abstract_shards(state, mesh), sharding.shardings(state, mesh)


def jit_create(
    lm: Backbone,
    train: Config,
    seed: int,
    length: int,
    shardings: TrainState,
    method: Method = FULL,
    form: str = "float32",
) -> Callable[[], TrainState]:
    """`init_state` jitted with `shardings`: no array is ever made unsharded."""
    init = init_state(lm, train, seed, length, method, form)
    return jax.jit(lambda: nn.unbox(init()), out_shardings=shardings)


def gradients(
    lm: Backbone,
    trainable: PyTree,
    batch: Batch,
    accumulate: int,
    frozen: PyTree | None = None,
    key: jax.Array | None = None,
    objective: Objective = NEXT_TOKEN,
) -> tuple[PyTree, dict[str, typing.Any]]:
    """`(gradients of the trainable parameters, metrics)` of a batch, accumulated over micro-batches of its rows.

    Noise of the objective and dropout of adapters are drawn from `key`, of which each micro-batch has its own fold.
    Without a key there is no dropout.
    """
    totals = objective.totals(batch, accumulate)

    def loss(trainable, micro, index):
        params = trainable if frozen is None else join(trainable, frozen)
        micro_key = None if key is None else jax.random.fold_in(key, index)
        params = params if micro_key is None else seeded(params, micro_key)
        return objective.loss(lm, params, micro, micro_key, totals)

    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    if accumulate == 1:
        (_, metrics), grads = value_and_grad(trainable, batch, 0)
        return grads, metrics

    # Row i goes to micro-batch i % accumulate: each micro-batch then has rows on every device, and no row moves.
    axes = objective.axes(lm)

    def split_rows(name, leaf):
        micro = leaf.reshape(leaf.shape[0] // accumulate, accumulate, *leaf.shape[1:]).swapaxes(0, 1)
        return sharding.constrain(micro, None, "batch", *axes[name])

    def micro_gradients(micro, index):
        (_, metrics), grads = value_and_grad(trainable, micro, index)
        return grads, metrics

    micros = {name: split_rows(name, leaf) for name, leaf in batch.items()}, jnp.arange(accumulate)
    shapes = jax.eval_shape(micro_gradients, *jax.tree.map(lambda leaf: leaf[0], micros))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(
        lambda total, micro: (jax.tree.map(jnp.add, total, micro_gradients(*micro)), None), zeros, micros
    )
    return jax.tree.map(lambda leaf: leaf / accumulate, total)


def train_step(
    lm: Backbone,
    train: Config,
    method: Method,
    state: TrainState,
    batch: Batch,
    objective: Objective = NEXT_TOKEN,
) -> tuple[TrainState, dict[str, typing.Any]]:
    """One optimiser step -> `(state, metrics)`."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    grads, metrics = gradients(lm, state.params, batch, train.accumulate, state.frozen, key, objective)
    with jax.named_scope("optimizer"):
        optimizer = from_config.optimizer(train, state.params, method.rates)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    params, _ = split(method, lm, models.after_step(lm, join(params, state.frozen), metrics["aux"]))
    metrics |= {
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": from_config.schedule(train)(state.step),
        **objective.counts(lm, batch),
    }
    averaged = {}
    if train.ema:
        with jax.named_scope("optimizer"):
            averaged["ema"] = jax.tree.map(
                lambda mean, leaf: mean + (1 - train.ema) * (leaf - mean), typing.cast(AveragedState, state).ema, params
            )
    # flax.struct adds `replace`, which mypy does not see.
    state = state.replace(step=state.step + 1, params=params, opt_state=opt_state, **averaged)  # type: ignore[attr-defined]
    return state, metrics


def jit_train_step(
    lm: Backbone,
    train: Config,
    mesh: Mesh,
    state_shardings: TrainState,
    method: Method = FULL,
    objective: Objective = NEXT_TOKEN,
    name: str = "train_step",
) -> jax.stages.Wrapped:
    """Jits `train_step` with explicit shardings; the state is donated, the batch is sharded by rows and tokens.

    `name` is the program's, by which traces tell the programs of a run apart.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, typing.Any]]:
        return train_step(lm, train, method, state, batch, objective)

    step.__name__ = name
    return jax.jit(
        step,
        in_shardings=(state_shardings, objective.batch_shardings(lm, mesh)),
        out_shardings=(state_shardings, sharding.replicated(mesh)),
        donate_argnums=0,
        compiler_options=rematerialization.compiler_options(mesh, lm.is_recurrent),
    )


def jit_eval_step(
    lm: Backbone, mesh: Mesh, params_shardings: PyTree, objective: Objective = NEXT_TOKEN
) -> jax.stages.Wrapped:
    """Jits `Objective.held_out_sums` with explicit shardings."""
    replicated = sharding.replicated(mesh)
    return jax.jit(
        functools.partial(objective.held_out_sums, lm),
        in_shardings=(params_shardings, objective.batch_shardings(lm, mesh), replicated),
        out_shardings=replicated,
        compiler_options=rematerialization.compiler_options(mesh, lm.is_recurrent),
    )
