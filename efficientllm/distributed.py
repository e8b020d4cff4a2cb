"""Several processes as one run: found by jax's own cluster detection, or named by three environment variables."""

import json
import os

import jax
import numpy as np
from jax.experimental import multihost_utils

from efficientllm.errors import UserError

# Set by the launchers whose environment jax.distributed reads by itself.
LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def initialise():
    """Joins the other processes, if the environment tells of any. Call before the first use of a device.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name them by hand.
    """
    # It would swallow a SIGTERM that comes before the loop listens; the loop has its own way of stopping all.
    jax.config.update("jax_enable_preemption_service", False)
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(num_processes=_number("JAX_NUM_PROCESSES"), process_id=_number("JAX_PROCESS_ID"))
    elif any(int(os.environ.get(name, "1")) > 1 for name in LAUNCHERS):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize()


def _number(name):
    return int(os.environ[name]) if name in os.environ else None


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


def together(function):
    """`function()` in every process; a UserError in one is a UserError in all, so that none waits for it forever."""
    result = error = None
    try:
        result = function()
    except UserError as raised:
        error = raised
    refusing = [index for index, refuses in enumerate(gather(error is not None)) if refuses]
    if error:
        raise error
    if refusing:
        raise UserError(f"process {refusing[0]} cannot go on; it says why")
    return result
