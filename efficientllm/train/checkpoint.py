"""Checkpoints through orbax: asynchronous, atomic and with checksums; the newest n and the best are retained."""

import contextlib
import errno
import logging
import math
import pathlib
import typing

import jax
from jax.experimental import multihost_utils

from efficientllm.errors import UserError
from efficientllm.record import checkpoint_checksums
from efficientllm.runtime import distributed, thread_errors
from efficientllm.typing import PyTree, Record

log = logging.getLogger("efficientllm")
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)  # disk full or failing


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, for example to a full disk; earlier checkpoints are intact."""


class Checkpoints:
    """The checkpoints of a run: for each step the sharded train state and every process's data iterator state.

    Args:
      folder: an absolute path, created if missing.
      keep: number of newest checkpoints to retain, at least 1; the one with the lowest held-out loss is also retained.

    `facts` is plain data to store in each checkpoint; `restored_facts` is that of the restored checkpoint.
    """

    def __init__(self, folder: pathlib.Path, keep: int) -> None:
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers

        best = checkpoint_managers.BestN(get_metric_fn=_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        newest = checkpoint_managers.LatestN(n=max(1, keep))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy([newest, best]),
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        self._args = ocp.args
        self._folder = folder
        self._saved_step: int | None = None
        self.facts: Record = {}
        self.restored_facts: Record = {}
        thread_errors.silence_orbax()
        self._manager = ocp.CheckpointManager(folder, options=options, item_names=("state", "data"))

    def save(self, step: int, state: PyTree, data_state: typing.Any, loss: float | None = None) -> None:
        """Starts to write; returns when the arrays are copied off the device. Raises CheckpointError.

        A state whose held-out `loss` is NaN or infinite is not saved: a run must not resume from it.
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

    def _write_checksums(self):
        """Callback of orbax, between writing a checkpoint's files and renaming its temporary folder."""
        if jax.process_index() == 0:
            unfinished = list(self._folder.glob(f"{self._saved_step}.orbax-checkpoint-tmp*"))
            checkpoint_checksums.write(unfinished[0] if unfinished else self._folder / str(self._saved_step))

    def saving(self) -> bool:
        """True while a checkpoint is being written."""
        return self._manager.is_saving_in_progress()

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def newest_bytes(self) -> int | None:
        """Size of the newest checkpoint in bytes, or None; call `wait` first."""
        step = self.latest_step()
        return None if step is None else _bytes(self._folder / str(step))

    def stored(self) -> tuple[list[int], int]:
        """`(steps, total bytes)` of the checkpoints on disk; call `wait` first."""
        steps = sorted(self._manager.all_steps())
        return steps, sum(_bytes(self._folder / str(step)) for step in steps)

    def restore_newest(self, shaped_like: PyTree) -> tuple[PyTree, typing.Any] | None:
        """Restores `(state, data_state)` of the newest readable checkpoint; None where no checkpoint exists.

        `shaped_like` is the abstract state, with shardings. After an older checkpoint is restored, newer ones that are
        damaged or unreadable are renamed `unreadable-STEP` with a warning. Raises UserError if all are unreadable.
        """
        unreadable = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            restored = self._restore(step, shaped_like)
            if not all(distributed.gather(restored is not None)):
                unreadable.append(step)
                continue
            self._set_aside(unreadable, "unreadable")
            state, data = restored
            self.restored_facts = data.get("facts") or {}
            return state, _data_state_here(data["processes"])
        if unreadable:
            raise UserError(f"none of the checkpoints in {self._folder} can be read; move that folder to start anew")
        return None

    def _restore(self, step, shaped_like):
        """Restores `(state, data)` of one checkpoint; None, with a warning, if it is damaged or cannot be read."""
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
        """Renames the folders of `steps` to `WHY-STEP`, so that orbax no longer sees them."""
        for step in steps:
            if jax.process_index() == 0:
                (self._folder / str(step)).rename(_unused_path(self._folder / f"{why}-{step}"))
        if steps:
            multihost_utils.sync_global_devices("set aside")
            self._manager.reload()

    def distrust(self, step: int) -> None:
        """Renames the checkpoint of `step`, if any, to `diverged-STEP`: its loss is NaN or infinite."""
        if step in self._manager.all_steps():
            self._set_aside([step], "diverged")

    def discard(self) -> None:
        """Deletes all checkpoints; call `wait` first."""
        for step in self._manager.all_steps():
            self._manager.delete(step)

    def wait(self) -> None:
        """Waits until the last checkpoint is on disk. Raises CheckpointError."""
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    @contextlib.contextmanager
    def _writing(self):
        """Raises every error of orbax as CheckpointError."""
        try:
            yield
        except Exception as error:  # orbax raises whatever its storage backends raise
            raise CheckpointError(f"cannot write a checkpoint to {self._folder} ({_first_line(error)})") from error

    def close(self) -> None:
        """Waits for the last write and stops orbax's threads."""
        with contextlib.suppress(CheckpointError), self._writing():  # `save` or `wait` has raised the same error
            self._manager.close()


def _bytes(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _unused_path(path):
    """`path`, or where it exists `path.2`, `path.3`, ..."""
    number, unused = 2, path
    while unused.exists():
        number, unused = number + 1, path.with_name(f"{path.name}.{number}")
    return unused


def _data_state_here(states):
    """Picks this process's data iterator state from the `states` saved by all processes.

    The number of processes may have changed only if all of them read the same data. Raises UserError otherwise.
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
