"""Which single change makes a step fit: each is tried, by the compiler where there is one."""

import dataclasses
import math

from efficientllm import sharding
from efficientllm.errors import UserError

FORMS = ("bfloat16", "int8()", "int4()")  # of weights that do not fit, from the largest to the smallest


@dataclasses.dataclass(frozen=True)
class Try:
    """One change, what it was called on the command line, and the bytes a device then needs; None if it was refused."""

    change: dict
    flags: str
    total_bytes: int | None
    fits: bool
    reason: str | None = None


def of_training(config, shape):
    """The changes of a training step that are tried, a list of each kind from the smallest to the largest; `shape` is
    the mesh's."""
    found = []
    if config.model.remat != "full":
        found.append([{"model.remat": "full"}])
    if shape["data"] > 1:
        sizes = _divisors(shape["data"])[1:]
        found.append([{"mesh": _mesh(shape, size)} for size in sizes])
    if (odd := _odd(shape["fsdp"])) > 1:  # 3 of 48 ways divide few widths, so that nothing is split
        found.append([{"mesh": _mesh(shape, 1 / odd)}])
    rows = config.train.batch_size // config.train.accumulate // math.prod(shape[axis] for axis in sharding.BATCH)
    found.append([{"train.accumulate": config.train.accumulate * size} for size in _divisors(rows)[1:]])
    return [steps for steps in found if steps]


def of_serving(config, smaller):
    """The changes of inference that are tried; `smaller` are the forms that weigh less than what it has."""
    rows = config.infer.batch_size
    found = [[{"quant": form} for form in smaller]]
    found.append([{"infer.batch_size": rows // size} for size in _divisors(rows)[1:]])
    return [steps for steps in found if steps]


def _mesh(shape, more):
    sizes = {**shape, "data": round(shape["data"] / more), "fsdp": round(shape["fsdp"] * more)}
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)


def _odd(number):
    """Its greatest odd divisor."""
    return number // (number & -number)


def _divisors(number):
    return [size for size in range(1, number + 1) if number % size == 0]


def attempt(candidates, memory_bytes, total_of):
    """The Tries of the lists `candidates`: of each kind the smallest change that fits, or its largest if none does.

    `total_of(change)` gives the bytes of a device, or raises UserError. The largest is tried first: where it does not
    fit, no smaller one will.
    """
    tries = []
    for steps in candidates:
        found = _try(steps[-1], memory_bytes, total_of)
        if found.fits and len(steps) > 1:
            found = _smallest(steps[:-1], found, memory_bytes, total_of)
        tries.append(found)
    return tries


def _smallest(steps, found, memory_bytes, total_of):
    """By halving: the smallest of `steps` that fits, `found` if none does."""
    low, high = 0, len(steps)
    while low < high:
        middle = (low + high) // 2
        one = _try(steps[middle], memory_bytes, total_of)
        low, high, found = (low, middle, one) if one.fits else (middle + 1, high, found)
    return found


def _try(change, memory_bytes, total_of):
    flags = " ".join(
        f"--config.{key}={value!r}" if " " in str(value) else f"--config.{key}={value}" for key, value in change.items()
    )
    try:
        total = total_of(change)
    except UserError as error:
        return Try(change, flags, None, False, str(error))
    if total is None:
        return Try(change, flags, None, False, "the compiler ran out of memory and does not say how much it wants")
    return Try(change, flags, total, total <= memory_bytes)
