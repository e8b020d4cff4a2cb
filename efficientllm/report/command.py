"""The command line that runs a row's config again: the base config, and a flag for every value that differs from it."""

import shlex

from efficientllm.config.differences import differences

FILE = "configs/base.py"


def command(row):
    """The command, quoted for a POSIX shell; of a sweep's run that left no config, the arguments that it was given."""
    given = row.config.get("command")
    arguments = given if isinstance(given, list) and given else [f"--config={FILE}", *flags(row.config)]
    return shlex.join(["python", "-m", "efficientllm.main", *map(str, arguments)])


def flags(config):
    """`--config.key=value` for each value of a flat config that the base config has otherwise."""
    return [f"--config.{key}={literal(config[key])}" for key in differences(config)]


def literal(value):
    """A value of a config as its flag takes it: JSON's lists are tuples."""
    return value if isinstance(value, str) else repr(_tuples(value))


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
