"""The package's table of hardware: `{"gpu": facts common to GPUs, "hardware": {name: facts}}`."""

import functools
import importlib.resources
import json

from efficientllm.errors import UserError, did_you_mean


@functools.cache
def table():
    """The whole table."""
    return json.loads(importlib.resources.files("efficientllm.plan").joinpath("data/hardware.json").read_text("utf-8"))


def entry(name):
    """`(name in the table, facts)` of `config.plan.hardware`; a beginning that only one name has will do.

    Raises UserError listing the known names.
    """
    known = table()["hardware"]
    near = [full for full in known if full == name] or [
        full for full in known if full.removeprefix("tpu_").startswith(name) and name
    ]
    if len(near) != 1:
        raise UserError(
            f"config.plan.hardware = {name!r}: no such hardware; known: {', '.join(known)}{did_you_mean(name, known)}"
        )
    return near[0], dict(known[near[0]])
