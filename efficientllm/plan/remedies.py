"""Search for a single config change with which a workload fits into memory."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence

from efficientllm import sharding
from efficientllm.errors import UserError
from efficientllm.typing import Config

FORMS = ("bfloat16", "int8()", "int4()")  # of weights, from largest to smallest
Change = dict[str, typing.Any]  # new values by config key, without `config.`


@dataclasses.dataclass(frozen=True)
class Try:
    """A config change that was tried.

    flags:        the change as command-line flags.
    total_bytes:  memory of a device with it; None if it was refused.
    reason:       why it was refused, or None.
    """

    change: Change
    flags: str
    total_bytes: int | None
    fits: bool
    reason: str | None = None


def of_training(config: Config, shape: Mapping[str, int]) -> list[list[Change]]:
    """The changes to try for a training step: a list for each kind, from the smallest change to the largest.

    `shape` is that of the mesh.
    """
    candidates = []
    if config.model.remat != "full":
        candidates.append([{"model.remat": "full"}])
    if shape["data"] > 1:
        sizes = _divisors(shape["data"])[1:]
        candidates.append([{"mesh": _mesh(shape, size)} for size in sizes])
    if (
        odd := _odd(shape["fsdp"])
    ) > 1:  # few widths are divisible by 48 = 3 x 16, and an indivisible one is not sharded
        candidates.append([{"mesh": _mesh(shape, 1 / odd)}])
    rows = config.train.batch_size // config.train.accumulate // math.prod(shape[axis] for axis in sharding.BATCH)
    candidates.append([{"train.accumulate": config.train.accumulate * size} for size in _divisors(rows)[1:]])
    return [changes for changes in candidates if changes]


def of_serving(config: Config, smaller: Sequence[str]) -> list[list[Change]]:
    """The changes to try for inference; `smaller` are the forms of weights with fewer bytes."""
    rows = config.infer.batch_size
    candidates = [[{"quant": form} for form in smaller]]
    candidates.append([{"infer.batch_size": rows // size} for size in _divisors(rows)[1:]])
    return [changes for changes in candidates if changes]


def _mesh(shape, factor):
    """The mesh spec with `factor` times the fsdp axis, and the data axis smaller by it."""
    sizes = {**shape, "data": round(shape["data"] / factor), "fsdp": round(shape["fsdp"] * factor)}
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)


def _odd(number):
    """The greatest odd divisor."""
    return number // (number & -number)


def _divisors(number):
    return [size for size in range(1, number + 1) if number % size == 0]


def attempt(
    candidates: Iterable[Sequence[Change]], memory_bytes: float, total_of: Callable[[Change], int | None]
) -> list[Try]:
    """Tries the `candidates` -> a Try for each kind: the smallest change that fits, or the largest if none does.

    `total_of(change)` returns the bytes of a device, or raises UserError. The largest change is tried first: if it does
    not fit, no smaller one does.
    """
    tries = []
    for changes in candidates:
        best = _try(changes[-1], memory_bytes, total_of)
        if best.fits and len(changes) > 1:
            best = _smallest(changes[:-1], best, memory_bytes, total_of)
        tries.append(best)
    return tries


def _smallest(changes, best, memory_bytes, total_of):
    """Bisects for the smallest of `changes` that fits; `best` if none does."""
    low, high = 0, len(changes)
    while low < high:
        middle = (low + high) // 2
        attempt = _try(changes[middle], memory_bytes, total_of)
        low, high, best = (low, middle, attempt) if attempt.fits else (middle + 1, high, best)
    return best


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
