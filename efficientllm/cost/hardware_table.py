"""Hardware table, data/hardware.json: `{"gpu": facts common to GPUs, "hardware": {name: facts}}`."""

import functools
import importlib.resources
import json
import typing

from efficientllm.errors import UserError, did_you_mean, short_repr
from efficientllm.registry.ranges import POSITIVE, check_range, real, whole
from efficientllm.untrusted import json_text

Facts = dict[str, typing.Any]
BYTES = real(2**20)


@functools.cache
def read_table() -> dict[str, typing.Any]:
    """Reads the whole table."""
    return json.loads(importlib.resources.files("efficientllm.cost").joinpath("data/hardware.json").read_text("utf-8"))


def plannable_hardware() -> dict[str, Facts]:
    """`{name: facts}` of hardware that can be planned for; of other devices only the peaks are known."""
    return {name: facts for name, facts in read_table()["hardware"].items() if "sources" in facts}


def find_hardware(name: str, where: str = "hardware") -> tuple[str, Facts]:
    """Looks up hardware -> `(name in the table, facts)`; messages begin with `where`.

    `name` is a name, a unique prefix of one, or a .json file of the user's. Case, dashes, blanks and the maker's name
    do not matter: `RTX 4090`, `NVIDIA H100`. Raises UserError.
    """
    if name.endswith(".json"):
        return name, _read_file(name, where)
    hardware, wanted = plannable_hardware(), _plain(name)
    exact = [full for full, facts in hardware.items() if wanted in map(_plain, (full, *facts.get("also", ())))]
    matches = exact or [full for full in hardware if wanted and _plain(full).startswith(wanted)]
    if len(matches) != 1:
        raise UserError(
            f"{where} = {short_repr(name)}: no such hardware; known: {', '.join(hardware)}, or a .json "
            f"file of your own{did_you_mean(name.lower(), hardware)}"
        )
    return matches[0], {key: value for key, value in hardware[matches[0]].items() if key != "also"}


def _plain(name):
    text = "".join(char for char in name.lower() if char.isalnum())
    return text.replace("nvidia", "").replace("geforce", "").removeprefix("rtx")


# Required and optional facts in a file of the user's hardware.
NEEDED = {"device_kind": str, "memory_bytes": BYTES, "bandwidth": POSITIVE, "flops": dict}
ALSO = {"platform": str, "tdp_w": POSITIVE, "per_host": whole(1, 2**16), "link": POSITIVE, "network": POSITIVE}


def _read_file(path, where):
    """Reads the user's JSON file, with the facts of a table entry and `flops` by dtype. Raises UserError."""
    where = f"{where} = {path!r}"
    facts = json_text.read(path, where=where)
    if missing := [key for key in NEEDED if key not in facts]:
        raise UserError(f"{where}: {', '.join(missing)} is missing; needed are {', '.join(NEEDED)}")
    for key, value in facts.items():
        allowed = (NEEDED | ALSO | {"sources": dict}).get(key)
        if allowed is None:
            raise UserError(f"{where}: no fact {key!r} is known; known: {', '.join(NEEDED | ALSO)}, sources")
        _check_fact(f"{where}: {key}", value, allowed)
    for dtype, value in facts["flops"].items():
        _check_fact(f"{where}: flops of {dtype}", value, POSITIVE)
    if facts.setdefault("platform", "gpu") not in ("gpu", "tpu"):
        raise UserError(f"{where}: platform = {short_repr(facts['platform'])}: is none of gpu, tpu")
    sources = dict.fromkeys(("memory", "power", "link", "network"), path)
    return {"link": 0, **facts, "sources": sources | facts.get("sources", {})}


def _check_fact(where, value, allowed):
    if isinstance(allowed, type):
        if not isinstance(value, allowed):
            raise UserError(f"{where} = {short_repr(value)}: must be a {allowed.__name__}")
    elif type(value) not in (int, float):
        raise UserError(f"{where} = {short_repr(value)}: must be {allowed}")
    else:
        check_range(where, value, allowed)
