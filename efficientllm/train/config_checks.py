"""Checks of a training config before compilation, and the LM that is trained. All raise UserError naming the key."""

from efficientllm import model, sharding
from efficientllm.errors import UserError
from efficientllm.optim import rules
from efficientllm.quant import apply as quant
from efficientllm.quant.base import rounds
from efficientllm.run_description import RunDescription
from efficientllm.typing import Config, Mesh


def check_form(run: RunDescription) -> None:
    """Raises UserError where quantized weights would have to be trained, and for a form that needs calibration."""
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
    """Raises UserError for rows longer than the positions of the model, or of the checkpoint it starts from."""
    length, max_positions = run.config.train.length, run.max_positions
    model.check_length(run.outline, length, f"config.train.length = {length}")
    if max_positions and length > max_positions:
        raise UserError(
            f"config.train.length = {length}: {run.config.model.pretrained} has {max_positions} positions; "
            f"take {max_positions} tokens at most"
        )


def check_rows(train: Config) -> None:
    """Raises UserError for counts below 1, and for a batch that `accumulate` does not divide."""
    for key in ("steps", "batch_size", "length", "accumulate", "log_every"):
        if train[key] < 1:
            raise UserError(f"config.train.{key} = {train[key]}: must be at least 1")
    if train.batch_size % train.accumulate:
        raise UserError(
            f"config.train.accumulate = {train.accumulate}: must divide config.train.batch_size = {train.batch_size}"
        )


def check_train(train: Config, mesh: Mesh) -> None:
    """Raises UserError for a batch, length or schedule that cannot be trained on `mesh`."""
    check_rows(train)
    rows, shards = train.batch_size // train.accumulate, sharding.count_row_shards(mesh)
    if rows % shards:
        raise UserError(
            f"config.train.batch_size = {train.batch_size}: {rows} rows a micro-batch do not divide over the "
            f"{shards} devices of the mesh axes data, fsdp and expert; {rows + -rows % shards} would"
        )
    if train.length % mesh.shape["sequence"]:
        raise UserError(
            f"config.train.length = {train.length}: the mesh axis sequence divides a row's tokens over "
            f"{mesh.shape['sequence']} devices; {train.length + -train.length % mesh.shape['sequence']} would do"
        )
    rules.schedule(train)


def training_lm(run: RunDescription) -> model.LM:
    """The LM that is trained: that of the RunDescription, unrolled (no scan over layers) where the method asks for it.

    Raises UserError as `check_form` and `check_length` do, and for a model that the tuning method does not support.
    """
    check_form(run)
    check_length(run)
    run.method.check(run.lm)
    return run.lm.clone(scan=False) if run.method.unrolled else run.lm
