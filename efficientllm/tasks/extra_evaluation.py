"""Held-out loss of a training run on text that it was not trained on: `config.eval.also`."""

import dataclasses
import logging
import typing

from efficientllm.evaluation import held_out
from efficientllm.metrics.reading import Reading
from efficientllm.objectives.base import Losses
from efficientllm.train.setup import Setup
from efficientllm.train.step import TrainState

log = logging.getLogger("efficientllm")
KEY = "eval_loss_also"


def readings(setup: Setup, compiled_eval: typing.Any, state: TrainState, table: typing.Any) -> dict[str, Reading]:
    """Evaluates the text with the program and the table of the run's own; nothing where the config names none."""
    if not setup.also_batches:
        return {}
    data, shardings = setup.config.eval.also, setup.batch_shardings
    losses = held_out.evaluate(setup.objective, compiled_eval, state.eval_params, setup.also_batches, table, shardings)
    log.info(f"{held_out.line(Losses({KEY: losses['eval_loss']}))}, of {data}")
    reading = setup.objective.readings(losses)["eval_loss"]
    return {KEY: dataclasses.replace(reading, source=f"held-out text of {data}")}
