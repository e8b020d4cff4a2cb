"""What a finished training leaves beside its row: an adapter in peft's format, a sample, and fewer checkpoints."""

import logging

import jax

from efficientllm.convert import peft as adapter_folder
from efficientllm.infer.generate import generate
from efficientllm.runtime import distributed

log = logging.getLogger("efficientllm")


def write_adapter(run, workdir, state):
    """The adapter in peft's format, where peft has one and there is a checkpoint to put it around.

    What was learnt is in the checkpoint, whatever fails here. Raises UserError for what the format cannot hold.
    """
    if run.source is None:
        return
    if not adapter_folder.is_writable(run.config.adapter):
        if run.method.learnt and distributed.is_main():
            log.info(f"adapter: peft has no format for {run.config.adapter!r}; what was learnt is in the checkpoint")
        return
    adapter_folder.write(run.lm, run.config.adapter, state.all_params, workdir.path / "adapter", run.source)
    if distributed.is_main():
        log.info(f"adapter: {workdir.shown / 'adapter'}, in peft's format")


def sample(run, params):
    """The text of `config.sample`, prompt and continuation; None for no tokens."""
    asked = run.config.sample
    if not asked.tokens:
        return None
    key = jax.random.key(run.config.seed)
    prompt = run.tokenizer.encode_prompt(asked.prompt)
    new = generate(run.lm, params, [prompt], asked.tokens, asked.temperature, key, run.tokenizer.end_ids)
    return asked.prompt + run.tokenizer.decode(jax.device_get(new)[0].tolist())


def keep_checkpoints(checkpoints, keep):
    """Says what stays for `--config.train.steps` of more; with `config.checkpoint.keep = 0` nothing does."""
    steps, size = checkpoints.stored()
    if not keep:
        checkpoints.discard()
        said = f"removed, {size / 1e6:,.1f} MB: config.checkpoint.keep = 0"
    else:
        named = ", ".join(map(str, steps))
        said = f"{named}; {size / 1e6:,.1f} MB that more steps can go on from, and config.checkpoint.keep=0 removes"
    if distributed.is_main():
        log.info(f"checkpoints: {said}")
