"""What a finished training leaves beside its row: an adapter in peft's format, a sample, and fewer checkpoints."""

import logging

from efficientllm.convert import peft
from efficientllm.infer.engine import Engine
from efficientllm.infer.samplers import Sample
from efficientllm.runtime import distributed

log = logging.getLogger("efficientllm")


def write_adapter(run, workdir, state):
    """The adapter in peft's format, where peft has one and there is a checkpoint to put it around.

    What was learnt is in the checkpoint, whatever fails here. Raises UserError for what the format cannot hold.
    """
    if run.source is None:
        return
    if not peft.is_writable(run.config.adapter):
        if run.method.learnt and distributed.is_main():
            log.info(f"adapter: peft has no format for {run.config.adapter!r}; what was learnt is in the checkpoint")
        return
    peft.write(run.lm, run.config.adapter, state.all_params, workdir.path / "adapter", run.source)
    if distributed.is_main():
        log.info(f"adapter: {workdir.shown / 'adapter'}, in peft's format")


def sample(run, params):
    """The text of `config.sample`, prompt and continuation; None for no tokens."""
    asked = run.config.sample
    if not asked.tokens:
        return None
    prompt, sampler = run.tokenizer.encode_prompt(asked.prompt), Sample(asked.temperature)
    engine = Engine(run.lm, params, sampler, run.tokenizer.end_ids, len(prompt) + asked.tokens)
    *_, (new_ids,) = engine.generate([prompt], asked.tokens, run.config.seed)
    return asked.prompt + run.tokenizer.decode(new_ids)


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
