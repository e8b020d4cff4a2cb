"""Exports of a finished training run: the adapter in peft's format, and the checkpoints to retain."""

import logging

from efficientllm.convert import peft
from efficientllm.record.workdir import Workdir
from efficientllm.runtime import distributed
from efficientllm.train.checkpoint import Checkpoints
from efficientllm.train.setup import Setup
from efficientllm.train.step import TrainState

log = logging.getLogger("efficientllm")


def write_adapter(setup: Setup, workdir: Workdir, state: TrainState) -> None:
    """Writes the adapter in peft's format; nothing for a new model, or an adapter for which peft has no format.

    The run's own checkpoint holds the adapter too. Raises UserError for an adapter that the format cannot hold.
    """
    if setup.source is None:
        return
    if not peft.is_writable(setup.config.adapter):
        if setup.method.learnt and distributed.is_main():
            log.info(f"adapter: peft has no format for {setup.config.adapter!r}; what was learnt is in the checkpoint")
        return
    peft.write(setup.lm, setup.config.adapter, state.all_params, workdir.path / "adapter", setup.source)
    if distributed.is_main():
        log.info(f"adapter: {workdir.shown / 'adapter'}, in peft's format")


def keep_checkpoints(checkpoints: Checkpoints, keep: int) -> None:
    """Logs the checkpoints from which a run of more steps can resume; removes them if `keep` is 0."""
    steps, size = checkpoints.stored()
    if not keep:
        checkpoints.discard()
        message = f"removed, {size / 1e6:,.1f} MB: config.checkpoint.keep = 0"
    else:
        steps_text = ", ".join(map(str, steps))
        message = (
            f"{steps_text}; {size / 1e6:,.1f} MB that more steps can go on from, and config.checkpoint.keep=0 removes"
        )
    if distributed.is_main():
        log.info(f"checkpoints: {message}")
