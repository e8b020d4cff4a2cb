"""Which implementation an operation runs on: chosen by platform and shape, overridable, and written into the row."""

import contextlib
import contextvars

import jax

_used = contextvars.ContextVar("used", default=None)


def platform():
    """The platform being compiled for: `cpu`, `gpu` or `tpu`."""
    return jax.default_backend()


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
