"""Optimizer from `config.train`: clipping, descent direction, and weight decay and learning rates by parameter name."""

import operator
import typing

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from efficientllm.errors import UserError
from efficientllm.registry import build
from efficientllm.untrusted import patterns
from efficientllm.weights import path_of

PyTree = typing.Any
Rules = typing.Sequence[tuple[str, float]]  # (regex, value) pairs; the first that matches a path applies


def match(rules: Rules, params: PyTree, where: str) -> PyTree:
    """Gives each parameter the value of the first rule whose regex is found in its path.

    `where` is the config key of the rules. Raises UserError for an invalid regex, and for a parameter that no rule
    matches.
    """
    try:
        compiled = [(patterns.compile(pattern, where), float(value)) for pattern, value in rules]
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} = {rules!r}: must be pairs of (regex, number): {error}") from None

    def first_match(keys, _):
        path = path_of(keys)
        for pattern, value in compiled:
            if pattern.search(path):
                return value
        raise UserError(f"{where}: no rule matches parameter {path!r}; end the rules with ('.*', value)")

    return jax.tree_util.tree_map_with_path(first_match, params)


def check_reach(rules: Rules, params: PyTree, where: str) -> None:
    """Raises UserError naming a regex of `rules` that is found in no parameter's path: it would do nothing."""
    paths = [path_of(keys) for keys, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    for pattern, _ in rules:
        if paths and not any(patterns.compile(pattern, where).search(path) for path in paths):
            parts = sorted({path.partition("/")[0] for path in paths})
            raise UserError(
                f"{where}: {pattern!r} matches no trained parameter; their paths begin with {', '.join(parts)}, such "
                f"as {paths[0]!r}: mend the regex, or leave the rule out"
            )


def schedule(train: ConfigDict) -> optax.Schedule:
    """Builds the learning rate as a function of the step from `config.train.schedule`."""
    return build("schedule", train.schedule, where="config.train.schedule", steps=train.steps)


def optimizer(train: ConfigDict, params: PyTree, rates: Rules = ()) -> optax.GradientTransformation:
    """Builds the optax transformation of `config.train` for a parameter tree, which may be abstract.

    Gradients are clipped by their global norm. The update of a parameter is then
    `-rate * lr * (direction + decay * parameter)`. `rate` comes from `config.train.rates`, and is multiplied by the
    adapter's own rule in `rates` where one matches. Raises UserError for a regex of `config.train.rates` that matches
    nothing.
    """
    check_reach(train.rates, params, "config.train.rates")
    decay = match(train.decay, params, "config.train.decay")
    adapter_rates = match((*rates, (".*", 1.0)), params, "rates")
    param_rates = jax.tree.map(operator.mul, adapter_rates, match(train.rates, params, "config.train.rates"))
    return optax.chain(
        _clip(train.clip) if train.clip else optax.identity(),
        build("optimizer", train.optimizer, where="config.train.optimizer"),
        _stateless(_decayed, decay, param_rates),
        optax.scale_by_learning_rate(schedule(train)),
    )


def _decayed(update, param, decay, rate):
    return rate * (update + decay * param.astype(update.dtype))


def _clip(max_norm):
    """Clips by the global norm: all gradients are multiplied by one factor."""
    # optax.clip_by_global_norm divides every gradient by the norm. XLA shares that division between its uses, and so
    # keeps a second copy of all gradients: 0.5 GB and 10 % of a step at 135 M parameters on a CPU.

    def update(updates, params):
        norm = optax.tree.norm(updates)
        factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda update: update * factor.astype(update.dtype), updates)

    return optax.stateless(update)


def _stateless(function, *trees):
    """An optax transformation that applies `function(update, param, *leaves of trees)` to every parameter."""

    def update(updates, params):
        return jax.tree.map(function, updates, params, *trees)

    return optax.stateless(update)
