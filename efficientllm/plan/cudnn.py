"""JAX's checks of cuDNN attention, asked of the GPU that is planned for: they ask the devices of the process, of which
a plan has none."""

import contextlib

from jax._src.cudnn import fused_attention_stablehlo as fused

_CHECKS = ("check_compute_capability", "is_cuda_compute_capability_equal")


@contextlib.contextmanager
def planned_for(capability):
    """Inside, attention in cuDNN is traced as on a GPU of the compute capability `(major, minor)`."""
    before = [getattr(fused, name) for name in _CHECKS]
    planned = tuple(capability)
    fused.check_compute_capability = lambda asked: planned >= _numbers(asked)
    fused.is_cuda_compute_capability_equal = lambda asked: planned == _numbers(asked)
    try:
        yield
    finally:
        for name, check in zip(_CHECKS, before, strict=True):
            setattr(fused, name, check)


def _numbers(text):
    return tuple(int(part) for part in text.split("."))
