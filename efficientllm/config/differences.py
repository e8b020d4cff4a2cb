"""What a config changes of the base config."""

import functools

from efficientllm import base_config
from efficientllm.config.plain import flatten, plain


@functools.cache
def base():
    """The base config, flat, as `config.json` would hold it."""
    return flatten(plain(base_config.get_config()))


def differences(config):
    """`{key: the base config's value}` of the keys of a flat config whose values differ; None for a key it lacks."""
    known = base()
    return {key: known.get(key) for key, value in config.items() if key not in known or known[key] != value}
