"""Several processes as one run: found by jax's own cluster detection, or named by three environment variables."""

import os

import jax

# Set by the launchers whose environment jax.distributed reads by itself.
LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def initialise():
    """Joins the other processes, if the environment tells of any. Call before the first use of a device.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name them by hand.
    """
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
