"""Which implementation an operation runs on: chosen by platform and shape, overridable, and written into the row."""

import contextlib
import contextvars

import jax

_used = contextvars.ContextVar("used", default=None)
_target = contextvars.ContextVar("target", default=None)


def platform():
    """The platform being compiled for: `cpu`, `gpu` or `tpu`."""
    return _target.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(target):
    """What is traced inside chooses its kernels for the platform `target`, whatever this machine has."""
    token = _target.set(target)
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
