"""JAX's checks of cuDNN attention, asked of the GPU that is planned for and of the cuDNN that its description names:
they ask the devices and libraries of the process, of which a plan needs none."""

import contextlib

from jax._src.cudnn import fused_attention_stablehlo as fused

from efficientllm.plan import hardware


@contextlib.contextmanager
def planned_for(capability):
    """Inside, attention in cuDNN is traced as on a GPU of the compute capability `(major, minor)`."""
    planned = tuple(capability)
    checks = {
        "check_compute_capability": lambda asked: planned >= _numbers(asked),
        "is_cuda_compute_capability_equal": lambda asked: planned == _numbers(asked),
        "check_cudnn_version": _version,
    }
    before = {name: getattr(fused, name) for name in checks}
    _put(checks)
    try:
        yield
    finally:
        _put(before)


def _put(checks):
    for name, check in checks.items():
        setattr(fused, name, check)


def _version():
    """As cuDNN numbers itself: 91000 of 9.10.0."""
    major, minor, patch = hardware.table()["gpu"]["cudnn"]
    return 10000 * major + 100 * minor + patch


def _numbers(text):
    return tuple(int(part) for part in text.split("."))
