"""Patches of JAX's checks of cuDNN attention, so that it can be traced on a machine without GPU and cuDNN.

The originals ask the process's own device and libraries. A plan answers with the planned GPU's compute capability, and
the cuDNN version of data/hardware.json.
"""

import contextlib
from collections.abc import Iterator

from jax._src.cudnn import fused_attention_stablehlo as fused

from efficientllm.cost.hardware_table import read_table


@contextlib.contextmanager
def planned_for(capability: tuple[int, int]) -> Iterator[None]:
    """Context in which cuDNN attention is traced as on a GPU of the compute capability `(major, minor)`."""
    planned = tuple(capability)
    checks = {
        "check_compute_capability": lambda required: planned >= _numbers(required),
        "is_cuda_compute_capability_equal": lambda required: planned == _numbers(required),
        "check_cudnn_version": _version,
    }
    originals = {name: getattr(fused, name) for name in checks}
    _patch(checks)
    try:
        yield
    finally:
        _patch(originals)


def _patch(checks):
    for name, check in checks.items():
        setattr(fused, name, check)


def _version():
    """The version as cuDNN numbers it: 91000 for 9.10.0."""
    major, minor, patch = read_table()["gpu"]["cudnn"]
    return 10000 * major + 100 * minor + patch


def _numbers(text):
    return tuple(int(number) for number in text.split("."))
