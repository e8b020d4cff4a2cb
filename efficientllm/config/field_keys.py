"""Names the config key in the errors of code that knows no config (`errors.FieldError`)."""

import contextlib
import typing

from efficientllm.config.plain import flatten
from efficientllm.errors import FieldError, UserError, short_repr
from efficientllm.typing import Config


@contextlib.contextmanager
def name_keys(config: Config) -> typing.Iterator[None]:
    """Context in which a FieldError names the key and the value of `config`: `config.model.remat = 'foo': ...`.

    A field whose name several groups of keys have is given with its group, `train.batch_size`. A FieldError stays as
    it is if the config has no such field, or has another value than the one complained about.
    """
    try:
        yield
    except FieldError as error:
        values = flatten(config.to_dict())
        keys = [key for key in values if f".{key}".endswith(f".{error.field}")]
        if len(keys) != 1 or error.value not in (None, values[keys[0]]):
            raise
        named = UserError(f"config.{keys[0]} = {short_repr(values[keys[0]])}: {error.problem}")
        named.shared = error.shared
        raise named from error
