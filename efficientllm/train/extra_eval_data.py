"""Other text than that trained on, which a run is evaluated on at its end: `config.eval.also`."""

import dataclasses
import typing

from efficientllm import data
from efficientllm.data.text import TextData
from efficientllm.errors import FieldError, UserError
from efficientllm.typing import Config


def held_out_batches(config: Config, dataset: typing.Any, share: dict[str, int]) -> typing.Iterable:
    """Batches of that text, for a process's `share` of the rows; none without one. Raises UserError."""
    if not config.eval.also:
        return ()
    where = f"config.eval.also = {config.eval.also!r}"
    if not isinstance(dataset, TextData) or data.modality(config.eval.also) != "text":
        raise UserError(f"{where}: is read by models that are trained on text alone; leave it out")
    also = dataclasses.replace(dataset, spec=config.eval.also)
    try:
        return also.held_out(config.train.batch_size, **share, limit=config.eval.batches or None)
    except FieldError as error:  # of this data, not of config.data
        raise UserError(f"{where}: {error.problem}") from error
