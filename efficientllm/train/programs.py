"""Compiled programs of a step, one for each size of a batch, called by the batch that is given."""

import typing
from collections.abc import Callable, Sequence

import jax

from efficientllm.typing import Batch

PROGRAM = "program"  # in a step's metrics: the index of the program that ran


def of_batch(programs: Sequence[jax.stages.Compiled], batches: Sequence[Batch]) -> Callable:
    """Returns a function that calls the program of its second argument, a batch; a single program as it is.

    `batches` are the abstract batches that they were compiled for.
    """
    if len(programs) == 1:
        return programs[0]
    indices = _by_shapes(batches)
    return lambda first, batch, *rest: programs[indices[_shapes(batch)]](first, batch, *rest)


def step_of_batch(programs: Sequence[jax.stages.Compiled], batches: Sequence[Batch]) -> Callable:
    """Returns a train step as `of_batch` does, whose metrics say which of several programs ran, as `PROGRAM`."""
    if len(programs) == 1:
        return programs[0]
    indices = _by_shapes(batches)

    def call(state: typing.Any, batch: Batch) -> tuple[typing.Any, dict[str, typing.Any]]:
        index = indices[_shapes(batch)]
        state, metrics = programs[index](state, batch)
        return state, {**metrics, PROGRAM: index}

    return call


def _by_shapes(batches):
    return {_shapes(batch): index for index, batch in enumerate(batches)}


def _shapes(batch):
    """The shape of each array of a batch, by name."""
    return tuple(sorted((name, tuple(leaf.shape)) for name, leaf in batch.items()))
