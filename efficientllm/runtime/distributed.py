"""Multi-process runs: joins the processes, exchanges values between them, and ends them together.

The processes are found by JAX's cluster detection, or named by three environment variables.
"""

import contextlib
import importlib.util
import json
import os
import sys
import traceback
import typing

import jax
import numpy as np
from jax.experimental import multihost_utils

from efficientllm.errors import UserError, short_repr
from efficientllm.registry import ranges
from efficientllm.runtime import stopping
from efficientllm.typing import PyTree

# Environment variables of launchers that jax.distributed detects by itself.
LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
# Heartbeat timeout in seconds: after it a process counts as dead, if its death breaks no connection before.
SILENT_S = 30
# Exit status after another process has died, when the same command would resume: EX_TEMPFAIL of sysexits.h.
LOST = 75


def initialise() -> None:
    """Joins the other processes of the run, if the environment names any. Call before the first use of a device.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name them explicitly. Raises UserError for a launcher
    that JAX does not detect.
    """
    # JAX's preemption service would swallow a SIGTERM before training starts; the training loop stops all processes.
    jax.config.update("jax_enable_preemption_service", False)
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        _join(**_processes_from_environment())
    elif launcher := _launcher():
        try:
            _join()
        except ValueError as error:
            raise UserError(
                f"{launcher} = {os.environ[launcher]}: JAX finds no cluster in the environment ({error}); "
                "set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
            ) from None


def _launcher():
    """The environment variable of a launcher of several processes that jax.distributed detects, or None."""
    variable = next((name for name in LAUNCHERS if _number(name, 1) > 1), None)
    # JAX reads a Kubernetes job through a package that not every image has.
    is_kubernetes_job = "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ
    return variable or (
        "JOB_COMPLETION_INDEX" if is_kubernetes_job and importlib.util.find_spec("kubernetes") else None
    )


def _join(**processes):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(heartbeat_timeout_seconds=SILENT_S, **_bind_address(), **processes)


def _bind_address():
    """Binds the coordinator to a loopback address if that is its address; JAX would listen on all interfaces."""
    host, _, port = os.environ.get("JAX_COORDINATOR_ADDRESS", "").rpartition(":")
    is_loopback = host == "localhost" or host.startswith("127.") or host == "[::1]"
    return {"coordinator_bind_address": f"{'127.0.0.1' if host == 'localhost' else host}:{port}"} if is_loopback else {}


def _processes_from_environment():
    """Process count and index from the JAX_* variables. Raises UserError for values that cannot be."""
    address = os.environ["JAX_COORDINATOR_ADDRESS"]
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"JAX_COORDINATOR_ADDRESS = {short_repr(address)}: must be HOST:PORT, such as 10.0.0.1:1234")
    count, index = _number("JAX_NUM_PROCESSES", least=1), _number("JAX_PROCESS_ID")
    if None in (count, index):
        missing = "JAX_NUM_PROCESSES" if count is None else "JAX_PROCESS_ID"
        raise UserError(f"JAX_COORDINATOR_ADDRESS = {short_repr(address)}: {missing} is missing; set it")
    if index >= count:
        raise UserError(f"JAX_PROCESS_ID = {index}: must be below JAX_NUM_PROCESSES = {count}; the first is 0")
    return {"num_processes": count, "process_id": index}


def _number(name, default=None, least=0):
    """The whole number in an environment variable. Raises UserError for anything else."""
    if name not in os.environ:
        return default
    text, allowed = os.environ[name].strip(), ranges.whole(least, 2**20)
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) in allowed):
        raise UserError(f"{name} = {short_repr(os.environ[name])}: must be {allowed}")
    return int(text)


def exit_process(status: int) -> int:
    """Exits at once with `status` if this process is one of several; returns `status` if it is alone.

    A normal exit would hang: JAX waits at exit for the other processes, and they wait for this one in a collective.
    """
    if is_multi_process():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def is_multi_process() -> bool:
    """Whether this process is one of several of a run."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


@contextlib.contextmanager
def exits_with_job() -> typing.Iterator[None]:
    """Context in which an exception that may be this process's alone ends it at once, and with it the job."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if is_multi_process():
            exit_process(stopping.report_stop(stop))
        raise
    except UserError as error:
        if not getattr(error, "shared", False) and is_multi_process():
            print(f"efficientllm: {error}", file=sys.stderr)
            exit_process(2)
        raise
    except Exception as error:
        if is_multi_process():
            traceback.print_exc()
            exit_process(LOST if isinstance(error, jax.errors.JaxRuntimeError) else 1)
        raise


def is_main() -> bool:
    """Whether this is the process that writes rows, logs and samples."""
    return jax.process_index() == 0


def gather(value: typing.Any) -> list:
    """All-gathers a JSON value: the list of every process's `value`, in process order. Blocks until all call it."""
    if not jax.distributed.is_initialized():  # asked first, since jax.process_count() would initialise the devices
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.int32(text.size)).max())
    width = 1 << (longest - 1).bit_length()  # powers of two, so that few programs are compiled
    rows = multihost_utils.process_allgather(np.pad(text, (0, width - text.size)))
    return [json.loads(row.tobytes().rstrip(b"\0")) for row in rows.reshape(-1, width)]


def to_host(tree: PyTree) -> PyTree:
    """Copies the arrays of `tree` to numpy, unsharded, in every process. All processes must call it."""

    def to_numpy(array):
        is_local = getattr(array, "is_fully_addressable", True)
        return np.asarray(array if is_local else multihost_utils.process_allgather(array, tiled=True))

    return jax.tree.map(to_numpy, tree)


def call_in_all(function: typing.Callable[[], typing.Any]) -> typing.Any:
    """Calls `function` in every process and returns its result. A UserError in one process raises in all of them.

    Otherwise the others would wait forever for the one that stopped.
    """
    result = error = None
    try:
        result = function()
    except UserError as raised:
        error = raised
    failed = [index for index, has_failed in enumerate(gather(error is not None)) if has_failed]
    if failed:
        error = error or UserError(f"process {failed[0]} cannot continue; its own message says why")
        error.shared = True
        raise error
    return result
