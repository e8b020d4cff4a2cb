"""Several processes as one run: found by jax's own cluster detection, or named by three environment variables."""

import contextlib
import importlib.util
import json
import os
import sys
import traceback

import jax
import numpy as np
from jax.experimental import multihost_utils

from efficientllm.errors import UserError, shown
from efficientllm.registry import ranges
from efficientllm.runtime import stopping

# Set by the launchers whose environment jax.distributed reads by itself.
LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
# Seconds without a sign of life after which a process counts as dead, where its death breaks no connection.
SILENT_S = 30
# Exit status where another process has died and the same command would go on: EX_TEMPFAIL of sysexits.h.
LOST = 75


def initialise():
    """Joins the other processes, if the environment tells of any. Call before the first use of a device.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name them by hand.
    Raises UserError for a launcher whose environment jax does not know.
    """
    # It would swallow a SIGTERM that comes before the loop listens; the loop has its own way of stopping all.
    jax.config.update("jax_enable_preemption_service", False)
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        _join(**_named())
    elif launcher := _launcher():
        try:
            _join()
        except ValueError as error:
            raise UserError(
                f"{launcher} = {os.environ[launcher]}, but jax finds no cluster in the environment ({error}); "
                "name the processes by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
            ) from None


def _launcher():
    """The variable that tells of several processes which jax.distributed can find by itself, or None."""
    found = next((name for name in LAUNCHERS if _number(name, 1) > 1), None)
    # Kubernetes tells jax of the others through a package that not every image has.
    asked = "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ
    return found or ("JOB_COMPLETION_INDEX" if asked and importlib.util.find_spec("kubernetes") else None)


def _join(**named):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(heartbeat_timeout_seconds=SILENT_S, **_bind_address(), **named)


def _bind_address():
    """What the coordinator listens on: its own address where that is this machine's alone, else jax's choice, which is
    all interfaces."""
    host, _, port = os.environ.get("JAX_COORDINATOR_ADDRESS", "").rpartition(":")
    local = host == "localhost" or host.startswith("127.") or host == "[::1]"
    return {"coordinator_bind_address": f"{'127.0.0.1' if host == 'localhost' else host}:{port}"} if local else {}


def _named():
    """The processes that the environment names by hand. Raises UserError for what cannot be."""
    address = os.environ["JAX_COORDINATOR_ADDRESS"]
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"JAX_COORDINATOR_ADDRESS = {shown(address)}: must be HOST:PORT, such as 10.0.0.1:1234")
    count, index = _number("JAX_NUM_PROCESSES", least=1), _number("JAX_PROCESS_ID")
    if None in (count, index):
        missing = "JAX_NUM_PROCESSES" if count is None else "JAX_PROCESS_ID"
        raise UserError(f"JAX_COORDINATOR_ADDRESS = {shown(address)}: needs {missing} too")
    if index >= count:
        raise UserError(f"JAX_PROCESS_ID = {index}: must be below JAX_NUM_PROCESSES = {count}; the first is 0")
    return {"num_processes": count, "process_id": index}


def _number(name, default=None, least=0):
    """The whole number in an environment variable. Raises UserError for what is none."""
    if name not in os.environ:
        return default
    text, allowed = os.environ[name].strip(), ranges.whole(least, 2**20)
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) in allowed):
        raise UserError(f"{name} = {shown(os.environ[name])}: must be {allowed}")
    return int(text)


def leave(status):
    """Ends this process at once if it is one of several: at exit jax waits for the others, and they wait for it in a
    collective. Returns `status` if it is alone."""
    if several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def several():
    """True if this process is one of several of a run."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


@contextlib.contextmanager
def leaving():
    """An exception that the other processes may not share ends this one at once, and with it the job."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if several():  # at exit jax would wait for the others
            leave(stopping.said(stop))
        raise
    except UserError as error:
        if not getattr(error, "shared", False) and several():
            print(f"efficientllm: {error}", file=sys.stderr)
            leave(2)
        raise
    except Exception as error:
        if several():
            traceback.print_exc()
            leave(LOST if isinstance(error, jax.errors.JaxRuntimeError) else 1)
        raise


def is_main():
    """True in the one process that writes rows, logs and samples."""
    return jax.process_index() == 0


def gather(value):
    """The value each process calls this with, anything JSON holds, as a list in their order; all wait for all."""
    if not jax.distributed.is_initialized():  # jax.process_count() would start the devices
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.int32(text.size)).max())
    width = 1 << (longest - 1).bit_length()  # few widths, few programs
    rows = multihost_utils.process_allgather(np.pad(text, (0, width - text.size)))
    return [json.loads(row.tobytes().rstrip(b"\0")) for row in rows.reshape(-1, width)]


def on_host(tree):
    """The arrays of `tree` as numpy's, whole in every process, all of which take part."""

    def whole(array):
        here = getattr(array, "is_fully_addressable", True)
        return np.asarray(array if here else multihost_utils.process_allgather(array, tiled=True))

    return jax.tree.map(whole, tree)


def together(function):
    """`function()` in every process; a UserError in one is a UserError in all, so that none waits for it forever."""
    result = error = None
    try:
        result = function()
    except UserError as raised:
        error = raised
    refusing = [index for index, refuses in enumerate(gather(error is not None)) if refuses]
    if refusing:
        error = error or UserError(f"process {refusing[0]} cannot go on; it says why")
        error.shared = True
        raise error
    return result
