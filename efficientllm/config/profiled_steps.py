"""Steps of `config.profile.steps`, FIRST:LAST, both included."""

import re
import typing

from efficientllm.errors import UserError, short_repr
from efficientllm.typing import Config

KEY = "config.profile.steps"


def read_steps(text: str) -> range:
    """Reads FIRST:LAST; no steps of an empty text. Raises ValueError that says what is wrong and what to do."""
    if not text:
        return range(0)
    match = re.fullmatch(r"(\d{1,10}):(\d{1,10})", text, re.ASCII)
    if not match:
        raise ValueError("is no range of steps; write FIRST:LAST, such as '10:13'")
    first, last = map(int, match.groups())
    if first < 1:
        raise ValueError(f"steps count from 1; write '1:{max(1, last)}'")
    if last < first:
        raise ValueError(f"ends before it begins; write '{last or 1}:{first}'")
    return range(first, last + 1)


def check_steps(where: str, value: typing.Any, has_plugins: bool = False) -> None:
    """Steps FIRST:LAST, or nothing."""
    try:
        read_steps(value)
    except ValueError as error:
        raise UserError(f"{where} = {short_repr(value)}: {error}") from None


def check_with_task(config: Config) -> None:
    """Raises UserError for steps that the task does not have."""
    text, steps = config.profile.steps, read_steps(config.profile.steps)
    if steps and config.task == "infer":
        raise UserError(f"{KEY} = {text!r}: config.task = 'infer' has no training steps; leave it out")
    if steps and steps[-1] > config.train.steps:
        first, last = min(steps[0], config.train.steps), config.train.steps
        raise UserError(f"{KEY} = {text!r}: config.train.steps = {last} is its last step; write '{first}:{last}'")
