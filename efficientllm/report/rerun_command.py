"""The command line that reruns a row's config: the base config, and a flag for every value that differs from it."""

import shlex
import typing

from efficientllm.config.differences import differences
from efficientllm.report.rows import Row

FILE = "configs/base.py"


def rerun_command(row: Row) -> str:
    """The command, quoted for a POSIX shell. A sweep's run that failed before it had a config repeats its arguments."""
    recorded = row.config.get("command")
    arguments = recorded if isinstance(recorded, list) and recorded else [f"--config={FILE}", *flags(row.config)]
    return shlex.join(["python", "-m", "efficientllm.main", *map(str, arguments)])


def flags(config: dict[str, typing.Any]) -> list[str]:
    """`--config.key=value` for each value of a flat config that differs from the base config."""
    return [f"--config.{key}={literal(config[key])}" for key in differences(config)]


def literal(value: typing.Any) -> str:
    """Formats a config value for its flag; JSON's lists become tuples."""
    return value if isinstance(value, str) else repr(_tuples(value))


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
