"""Type checks of a record.json: rows of others are untrusted input."""

import os
import typing

from efficientllm.errors import UserError, short_repr

_NUMBER, _TEXT, _FLAG = (int, float), (str, type(None)), (bool, type(None))
_WHOLE, _OBJECT, _LIST = (int, type(None)), (dict, type(None)), (list, type(None))
_SCALAR = (str, int, float, type(None))
# Allowed types by path; a missing key is null. `*` stands for every key.
TYPES = {
    **dict.fromkeys(("paper", "physical", "quality", "sources", "provenance", "config"), (dict,)),
    "outcome": (str,),
    "task": (str,),
    "name": _TEXT,
    **dict.fromkeys(("sweep", "conditions", "warm_up", "predicted"), _OBJECT),
    "sources.*": (dict,),
    **dict.fromkeys(("sources.*.source", "sources.*.reason", "sources.*.unit"), _TEXT),
    "conditions.starved": _FLAG,
    "conditions.reasons": _LIST,
    "conditions.reasons.*": (str,),
    "conditions.stopped_s": (*_NUMBER, type(None)),
    "warm_up.settled": _FLAG,
    "warm_up.discarded_s": _LIST,
    "warm_up.interrupted_steps": _WHOLE,
    **dict.fromkeys(("sweep.name", "sweep.variant", "sweep.baseline", "sweep.measures"), _TEXT),
    **dict.fromkeys(("sweep.block", "sweep.order"), _WHOLE),
    **dict.fromkeys(("provenance.run", "provenance.started", "provenance.xla_flags"), _TEXT),
    **dict.fromkeys(
        (f"provenance.{key}" for key in ("devices", "host", "allocator", "versions", "data", "git", "samples")), _OBJECT
    ),
    **dict.fromkeys(("provenance.devices.kind", "provenance.devices.platform", "provenance.data.fingerprint"), _TEXT),
    "provenance.data.size": _WHOLE,
    "provenance.resumed_from_step": _WHOLE,
    "provenance.devices.count": _WHOLE,
    "provenance.host.processor": _OBJECT,
    "provenance.host.power_source": _TEXT,
    "provenance.host.name_hash": _TEXT,
    "provenance.host.processor.name": _TEXT,
    "provenance.host.processor.model": _TEXT,
    "provenance.host.processor.cores": _WHOLE,
    "provenance.git.commit": _TEXT,
    "provenance.precision": _OBJECT,
    "provenance.precision.chosen": _TEXT,
    **dict.fromkeys(("config.objective", "config.autoencoder"), _TEXT),
    "config.seed": _SCALAR,
    "config.name": _TEXT,
    "config.task": _TEXT,
    "config.plan": _OBJECT,
    "config.plan.of": _TEXT,
    "config.model": _OBJECT,
    "config.model.size": _SCALAR,
    "config.train": _OBJECT,
}
_NAMES = {str: "a text", dict: "an object", list: "a list", bool: "true or false", int: "a whole number"}


def check_types(record: dict[str, typing.Any], file: str | os.PathLike[str]) -> None:
    """Raises UserError for a record with a value of a wrong type."""
    for path, kinds in TYPES.items():
        _check(record, path.split("."), kinds, file, path)


def _check(value, keys, kinds, file, path):
    if not keys:
        wrong = isinstance(value, bool) and bool not in kinds
        if wrong or not isinstance(value, kinds):
            wanted = " or ".join(_NAMES.get(kind, "a number") for kind in kinds if kind is not type(None))
            raise UserError(f"{file}: no row: its {path!r} is {short_repr(value)}, not {wanted}")
        return
    first, rest = keys[0], keys[1:]
    if first == "*":
        for item in value.values() if isinstance(value, dict) else value or ():
            _check(item, rest, kinds, file, path)
    elif isinstance(value, dict):
        _check(value.get(first), rest, kinds, file, path)
