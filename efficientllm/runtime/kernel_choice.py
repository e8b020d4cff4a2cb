"""Which implementation an operation runs on: chosen by platform and shape, overridable, and written into the row."""

import contextlib
import contextvars

import jax

_used = contextvars.ContextVar("used", default=None)
_target = contextvars.ContextVar("target", default=(None, (0, 0)))


def platform():
    """The platform being compiled for: `cpu`, `gpu` or `tpu`."""
    return _target.get()[0] or jax.default_backend()


def capability():
    """The compute capability `(major, minor)` of the GPU being compiled for; (0, 0) where it is none, or not known."""
    name, planned = _target.get()
    if name is not None or jax.default_backend() != "gpu":
        return planned
    return tuple(int(part) for part in jax.local_devices()[0].compute_capability.split("."))


@contextlib.contextmanager
def compiling_for(name, capability=(0, 0)):
    """What is traced inside chooses its kernels for the platform `name`, whatever this machine has; of a GPU it may be
    told the compute capability."""
    token = _target.set((name, tuple(capability)))
    try:
        yield
    finally:
        _target.reset(token)


def note(operation, kernel):
    """Says at trace time that `operation` runs on `kernel`; returns `kernel`."""
    if (used := _used.get()) is not None:
        used.setdefault(operation, set()).add(kernel)
    return kernel


@contextlib.contextmanager
def recording():
    """Collects what is noted while tracing inside: `{operation: {kernel, ...}}`."""
    used = {}
    token = _used.set(used)
    try:
        yield used
    finally:
        _used.reset(token)
