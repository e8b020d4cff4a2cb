"""From `config.train` to one optax transformation: clipping, direction, decay and rates by parameter name."""

import operator

import jax
import jax.numpy as jnp
import optax

from efficientllm.errors import UserError
from efficientllm.registry import build
from efficientllm.untrusted import patterns
from efficientllm.weights import path_of


def match(rules, params, where):
    """A tree of the value of the first (regex, value) rule found in each parameter's path.

    Raises UserError for a rule that is no regex and for a parameter no rule covers.
    """
    try:
        compiled = [(patterns.compile(pattern, where), float(value)) for pattern, value in rules]
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} = {rules!r} must be pairs of (regex, number): {error}") from None

    def first(keys, _):
        path = path_of(keys)
        for pattern, value in compiled:
            if pattern.search(path):
                return value
        raise UserError(f"{where} covers no parameter {path!r}; end it with ('.*', value)")

    return jax.tree_util.tree_map_with_path(first, params)


def schedule(train):
    """Learning rate as a function of the step, from `config.train.schedule`."""
    return build("schedule", train.schedule, where="config.train.schedule", steps=train.steps)


def optimizer(train, params, rates=()):
    """The optax transformation of `config.train` for a parameter tree (abstract will do).

    The update of a parameter is `-rate * lr * (direction + decay * parameter)`, after clipping by the global norm. Its
    rate is that of `config.train.rates`, times that of the rules `rates` if one of them finds it.
    """
    decay = match(train.decay, params, "config.train.decay")
    own = match((*rates, (".*", 1.0)), params, "rates")
    rates = jax.tree.map(operator.mul, own, match(train.rates, params, "config.train.rates"))
    return optax.chain(
        _clip(train.clip) if train.clip else optax.identity(),
        build("optimizer", train.optimizer, where="config.train.optimizer"),
        _stateless(lambda update, param, d, r: r * (update + d * param.astype(update.dtype)), decay, rates),
        optax.scale_by_learning_rate(schedule(train)),
    )


def _clip(most):
    """Clipping by the global norm, as one factor of all gradients.

    optax divides each gradient by the norm; XLA does a division once for all that use it, hence keeps a second copy of
    all gradients (0.5 GB and a tenth of a step of 135 M parameters on a CPU).
    """

    def update(updates, params):
        norm = optax.tree.norm(updates)
        factor = jnp.where(norm < most, 1.0, most / norm)
        return jax.tree.map(lambda update: update * factor.astype(update.dtype), updates)

    return optax.stateless(update)


def _stateless(function, *trees):
    def update(updates, params):
        return jax.tree.map(function, updates, params, *trees)

    return optax.stateless(update)
