"""Checkpoints through orbax: asynchronous, the last n and the best, and never half of one."""

import contextlib
import logging

import jax
from jax.experimental import multihost_utils

from efficientllm import distributed
from efficientllm.errors import UserError

log = logging.getLogger("efficientllm")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written (a full disk, say); those before it are whole."""


class Checkpoints:
    """The checkpoints of a run: train state (sharded) and the data iterators' states, together under one step.

    Args:
      folder: an absolute folder, made if it is not there.
      keep: how many of the newest stay; the best by `loss` stays besides.
    """

    def __init__(self, folder, keep):
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers

        best = checkpoint_managers.BestN(get_metric_fn=_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        policy = checkpoint_managers.AnyPreservationPolicy([checkpoint_managers.LatestN(n=keep), best])
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, cleanup_tmp_directories=True)
        self._args = ocp.args
        self._folder = folder
        self._manager = ocp.CheckpointManager(folder, options=options, item_names=("state", "data"))

    def save(self, step, state, data_state, loss=None):
        """Starts writing; returns as soon as the arrays are copied off the device. Raises CheckpointError."""
        states = {"processes": distributed.gather(data_state)}
        args = self._args.Composite(state=self._args.StandardSave(state), data=self._args.JsonSave(states))
        metrics = None if loss is None else {"loss": float(loss)}
        with self._writing():
            self._manager.save(int(step), args=args, metrics=metrics, force=True)

    def saving(self):
        """True until what was saved last is on disk."""
        return self._manager.is_saving_in_progress()

    def latest_step(self):
        """The newest step there is a checkpoint of, or None."""
        return self._manager.latest_step()

    def newest_bytes(self):
        """Bytes on disk of the newest checkpoint, or None if there is none; `wait` first."""
        step = self.latest_step()
        if step is None:
            return None
        return sum(file.stat().st_size for file in (self._folder / str(step)).rglob("*") if file.is_file())

    def restore_newest(self, shaped_like):
        """`(state, data_state)` of the newest checkpoint that can be read, or None if there is none at all.

        Newer ones that cannot be read are set aside as `unreadable-STEP` with a warning, once an older one is loaded.
        Raises UserError if none can be read.
        """
        unreadable = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            restored = self._try(step, shaped_like)
            if not all(distributed.gather(restored is not None)):
                unreadable.append(step)
                continue
            self._set_aside(unreadable)
            state, data = restored
            return state, _own(data["processes"])
        if unreadable:
            raise UserError(f"none of the checkpoints in {self._folder} can be read; move that folder to start anew")
        return None

    def _try(self, step, shaped_like):
        """What the checkpoint holds, or None with a warning if it cannot be read."""
        args = self._args.Composite(state=self._args.StandardRestore(shaped_like), data=self._args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=args)
        except Exception as error:  # orbax raises whatever its storage backends raise
            log.warning("checkpoint %d cannot be read (%s); trying the one before", step, _first_line(error))
            return None
        return restored["state"], restored["data"]

    def _set_aside(self, steps):
        for step in steps:
            if jax.process_index() == 0:
                (self._folder / str(step)).rename(self._folder / f"unreadable-{step}")
        if steps:
            multihost_utils.sync_global_devices("set aside")
            self._manager.reload()

    def wait(self):
        """Blocks until what was saved is on disk. Raises CheckpointError."""
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except Exception as error:  # orbax raises whatever its storage backends raise
            raise CheckpointError(f"cannot write a checkpoint to {self._folder} ({_first_line(error)})") from error

    def close(self):
        """Waits and releases orbax's threads."""
        with contextlib.suppress(CheckpointError), self._writing():  # said once already, by save or wait
            self._manager.close()


def _own(states):
    """This process's data state of those that were saved, by as many processes or fewer or more.

    Raises UserError if each had data of its own and their number is another now.
    """
    if len(states) == jax.process_count():
        return states[jax.process_index()]
    if any(state != states[0] for state in states):
        raise UserError(
            f"the checkpoint holds a data stream shared by {len(states)} processes; "
            f"{jax.process_count()} cannot go on with it"
        )
    return states[0]


def _loss(metrics):
    return metrics["loss"]


def _first_line(error):
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"[:200]
