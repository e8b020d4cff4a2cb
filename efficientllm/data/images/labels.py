"""Class numbers of labels, which sources give as names or as numbers."""

import typing
from collections.abc import Sequence

import numpy as np

from efficientllm.errors import FieldError, short_repr

MOST = 2**20  # classes


def number_labels(
    spec: str, labels: Sequence[str | int | None], names: Sequence[str], classes: Sequence[str] = ()
) -> tuple[list[str], np.ndarray]:
    """Returns the names of the classes and the int32 number of each label; without labels none, and zeros.

    `classes` are the names in their order where the source knows them, else names are sorted and numbers begin at 0.
    `names` are those of the pictures. Raises UserError for a label that is none of the classes, and for one that is
    missing where others are there.
    """
    if all(label is None for label in labels):
        return [], np.zeros(len(labels), np.int32)
    for name, label in zip(names, labels, strict=True):
        if label is None:
            raise FieldError("data", f"{name} has no label, and others have; give it one", spec)
        if not isinstance(label, str | int | np.integer) or isinstance(label, str) != isinstance(labels[0], str):
            raise FieldError("data", f"{_of(name, label)}: labels are all names, or all numbers", spec)
    class_names = list(classes) or _class_names(labels)
    is_named = isinstance(labels[0], str)
    numbers: typing.Any = range(len(class_names))
    if is_named:
        numbers = {name: number for number, name in enumerate(class_names)}
    for name, label in zip(names, labels, strict=True):
        if label not in numbers:
            raise FieldError("data", f"{_of(name, label)}: is none of the {len(class_names):,} classes", spec)
    return class_names, np.array([numbers[label] for label in labels], np.int32)


def _class_names(labels):
    return sorted(set(labels)) if isinstance(labels[0], str) else list(map(str, range(min(max(labels) + 1, MOST))))


def _of(name, label):
    return f"label {short_repr(label)} of {name}"
