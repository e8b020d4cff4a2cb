"""Differences of a config from the base config."""

import functools
import typing

from efficientllm import base_config
from efficientllm.config.plain import flatten, plain


@functools.cache
def base() -> dict[str, typing.Any]:
    """The base config, flat, as `config.json` would hold it."""
    return flatten(plain(base_config.get_config()))


def differences(config: typing.Mapping[str, typing.Any]) -> dict[str, typing.Any]:
    """`{key: the base config's value}` of the keys of a flat config whose values differ; None for a key it lacks."""
    defaults = base()
    return {key: defaults.get(key) for key, value in config.items() if key not in defaults or defaults[key] != value}
