"""Kernel choice: the platform being compiled for, and a record of which kernel each operation was traced with."""

import contextlib
import contextvars
import typing

import jax

_used: contextvars.ContextVar[dict[str, set[str]] | None] = contextvars.ContextVar("used", default=None)
_target: contextvars.ContextVar[tuple[str | None, tuple[int, ...]]]
_target = contextvars.ContextVar("target", default=(None, (0, 0)))


def platform() -> str:
    """The platform being compiled for: `cpu`, `gpu` or `tpu`."""
    return _target.get()[0] or jax.default_backend()


def capability() -> tuple[int, ...]:
    """Compute capability `(major, minor)` of the GPU being compiled for; (0, 0) if there is none or it is unknown."""
    name, planned = _target.get()
    if name is not None or jax.default_backend() != "gpu":
        return planned
    numbers = jax.local_devices()[0].compute_capability.split(".")
    return tuple(map(int, numbers)) if all(number.isdecimal() for number in numbers) else (0, 0)  # AMD's are names


@contextlib.contextmanager
def compiling_for(name: str, capability: tuple[int, int] = (0, 0)) -> typing.Iterator[None]:
    """Context in which tracing chooses kernels for the platform `name` instead of this machine's.

    `capability` is the compute capability of the GPU, if the platform is one.
    """
    token = _target.set((name, tuple(capability)))
    try:
        yield
    finally:
        _target.reset(token)


def record_kernel(operation: str, kernel: str) -> str:
    """Records at trace time that `operation` runs on `kernel`; returns `kernel`."""
    if (used := _used.get()) is not None:
        used.setdefault(operation, set()).add(kernel)
    return kernel


@contextlib.contextmanager
def recording_kernels() -> typing.Iterator[dict[str, set[str]]]:
    """Context that collects the kernels of everything traced inside: `{operation: {kernel, ...}}`."""
    used: dict[str, set[str]] = {}
    token = _used.set(used)
    try:
        yield used
    finally:
        _used.reset(token)
