"""Checkpoints through orbax: asynchronous, the last n and the best, with checksums, and never half of one."""

import contextlib
import errno
import logging
import math

import jax
from jax.experimental import multihost_utils

from efficientllm.errors import UserError
from efficientllm.record import checkpoint_checksums
from efficientllm.runtime import distributed, quiet_threads

log = logging.getLogger("efficientllm")
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)  # of a write that failed, here or elsewhere


class CheckpointError(RuntimeError):
    """A checkpoint could not be written (a full disk, say); those before it are whole."""


class Checkpoints:
    """The checkpoints of a run: train state (sharded) and the data iterators' states, together under one step.

    Args:
      folder: an absolute folder, made if it is not there.
      keep: how many of the newest stay, 1 at least; the best by `loss` stays besides.

    `facts` is plain data that each checkpoint holds besides, `restored_facts` what the one restored holds.
    """

    def __init__(self, folder, keep):
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers

        best = checkpoint_managers.BestN(get_metric_fn=_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        newest = checkpoint_managers.LatestN(n=max(1, keep))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy([newest, best]),
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._sum_up),
        )
        self._args = ocp.args
        self._folder = folder
        self._saved_step = None
        self.facts, self.restored_facts = {}, {}
        quiet_threads.silence_orbax()
        self._manager = ocp.CheckpointManager(folder, options=options, item_names=("state", "data"))

    def save(self, step, state, data_state, loss=None):
        """Starts writing; returns as soon as the arrays are copied off the device. Raises CheckpointError.

        A state whose held-out `loss` is no number is not saved: nothing good could be resumed from it.
        """
        if loss is not None and not math.isfinite(loss):
            log.warning(f"no checkpoint at step {step}: its held-out loss is {loss}")
            return
        states = {"processes": distributed.gather(data_state), "facts": self.facts}
        args = self._args.Composite(state=self._args.StandardSave(state), data=self._args.JsonSave(states))
        metrics = None if loss is None else {"loss": float(loss)}
        with self._writing():
            self._manager.wait_until_finished()
            self._saved_step = int(step)
            self._manager.save(int(step), args=args, metrics=metrics, force=True)

    def _sum_up(self):
        """Called by orbax when all files of a checkpoint are written, before it gets its name."""
        if jax.process_index() == 0:
            drafts = list(self._folder.glob(f"{self._saved_step}.orbax-checkpoint-tmp*"))
            checkpoint_checksums.write(drafts[0] if drafts else self._folder / str(self._saved_step))

    def saving(self):
        """True until what was saved last is on disk."""
        return self._manager.is_saving_in_progress()

    def latest_step(self):
        """The newest step there is a checkpoint of, or None."""
        return self._manager.latest_step()

    def newest_bytes(self):
        """Bytes on disk of the newest checkpoint, or None if there is none; `wait` first."""
        step = self.latest_step()
        return None if step is None else _bytes(self._folder / str(step))

    def stored(self):
        """`(steps, bytes on disk of all of them)`; `wait` first."""
        steps = sorted(self._manager.all_steps())
        return steps, sum(_bytes(self._folder / str(step)) for step in steps)

    def restore_newest(self, shaped_like):
        """`(state, data_state)` of the newest checkpoint that is whole, or None if there is none at all.

        Newer ones that are damaged or cannot be read are set aside as `unreadable-STEP` with a warning, once an older
        one is loaded. Raises UserError if none can be read.
        """
        unreadable = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            restored = self._try(step, shaped_like)
            if not all(distributed.gather(restored is not None)):
                unreadable.append(step)
                continue
            self._set_aside(unreadable, "unreadable")
            state, data = restored
            self.restored_facts = data.get("facts") or {}
            return state, _own(data["processes"])
        if unreadable:
            raise UserError(f"none of the checkpoints in {self._folder} can be read; move that folder to start anew")
        return None

    def _try(self, step, shaped_like):
        """What the checkpoint holds, or None with a warning if it is damaged or cannot be read."""
        folder = self._folder / str(step)
        damage, *_ = distributed.gather(checkpoint_checksums.damage(folder) if distributed.is_main() else None)
        if damage:
            log.warning("checkpoint %d cannot be read (damaged: %s); trying the one before", step, damage)
            return None
        args = self._args.Composite(state=self._args.StandardRestore(shaped_like), data=self._args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=args)
        except Exception as error:  # orbax raises whatever its storage backends raise
            log.warning("checkpoint %d cannot be read (%s); trying the one before", step, _first_line(error))
            return None
        return restored["state"], restored["data"]

    def _set_aside(self, steps, why):
        for step in steps:
            if jax.process_index() == 0:
                (self._folder / str(step)).rename(_free(self._folder / f"{why}-{step}"))
        if steps:
            multihost_utils.sync_global_devices("set aside")
            self._manager.reload()

    def distrust(self, step):
        """Sets the checkpoint of `step` aside, if there is one: the loss of its parameters is no number."""
        if step in self._manager.all_steps():
            self._set_aside([step], "diverged")

    def discard(self):
        """Removes all checkpoints; `wait` first."""
        for step in self._manager.all_steps():
            self._manager.delete(step)

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


def _bytes(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _free(path):
    """The path, or one with a number after it where something stands already."""
    number, free = 2, path
    while free.exists():
        number, free = number + 1, path.with_name(f"{path.name}.{number}")
    return free


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
