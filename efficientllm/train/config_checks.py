"""Checks of a training config before anything is compiled, and the model that it trains. They raise UserError."""

from efficientllm import model, sharding
from efficientllm.errors import UserError
from efficientllm.optim import rules
from efficientllm.quant import apply as quant
from efficientllm.quant.base import rounds
from efficientllm.run_description import RunDescription
from efficientllm.typing import Config, Mesh


def check_form(run: RunDescription) -> None:
    """Refuses a RunDescription with rounded weights where nothing but them could learn."""
    form, adapter = run.config.quant, run.config.adapter
    quantizer = quant.form_of(form)
    if not rounds(quantizer):
        return
    if not run.method.learnt:
        raise UserError(
            f"config.quant = {form!r} with config.adapter = {adapter!r}: rounded weights cannot learn; take an adapter "
            "such as 'lora(rank=8)', or config.quant = 'float32'"
        )
    if quantizer.calibrated:
        raise UserError(f"config.quant = {form!r}: tuning rounds to the nearest; take 'nf4()', 'int4()' or 'int8()'")


def check_length(run: RunDescription) -> None:
    """Refuses rows of more tokens than the model of a RunDescription has positions, or its checkpoint was made for."""
    length, most = run.config.train.length, run.max_positions
    model.check_length(run.outline, length, f"config.train.length = {length}")
    if most and length > most:
        raise UserError(
            f"config.train.length = {length}: {run.config.model.pretrained} has {most} positions; take {most} tokens "
            "at most"
        )


def check_rows(train: Config) -> None:
    """Refuses counts that cannot be. Raises UserError naming the key."""
    for key in ("steps", "batch_size", "length", "accumulate", "log_every"):
        if train[key] < 1:
            raise UserError(f"config.train.{key} = {train[key]}: must be at least 1")
    if train.batch_size % train.accumulate:
        raise UserError(
            f"config.train.accumulate = {train.accumulate}: must divide config.train.batch_size = {train.batch_size}"
        )


def check_train(train: Config, mesh: Mesh) -> None:
    """Refuses what can't be trained. Raises UserError naming the key."""
    check_rows(train)
    rows, ways = train.batch_size // train.accumulate, sharding.row_ways(mesh)
    if rows % ways:
        raise UserError(
            f"config.train.batch_size = {train.batch_size}: {rows} rows a micro-batch do not divide over the "
            f"{ways} devices of the mesh axes data, fsdp and expert; {rows + -rows % ways} would"
        )
    if train.length % mesh.shape["sequence"]:
        raise UserError(
            f"config.train.length = {train.length}: the mesh axis sequence divides a row's tokens over "
            f"{mesh.shape['sequence']} devices; {train.length + -train.length % mesh.shape['sequence']} would do"
        )
    rules.schedule(train)


def training_lm(run: RunDescription) -> model.LM:
    """The LM of a RunDescription as it is trained: its layers apart where the method says so.

    Raises UserError for rounded weights that cannot learn, rows that are too long, and what the method does not admit.
    """
    check_form(run)
    check_length(run)
    run.method.check(run.lm)
    return run.lm.clone(scan=False) if run.method.unrolled else run.lm
