"""Checks of a training config before compilation, and the LM that is trained. All raise UserError naming the key."""

import dataclasses
import typing

from efficientllm import model, sharding
from efficientllm.autoencoders.check_fit import check_autoencoder
from efficientllm.cost import formulas
from efficientllm.errors import UserError
from efficientllm.objectives.base import Objective
from efficientllm.objectives.next_token import NEXT_TOKEN
from efficientllm.optim import from_config
from efficientllm.quant import apply as quant
from efficientllm.quant.base import rounds
from efficientllm.run_description import RunDescription
from efficientllm.typing import Config, Mesh


def check_form(run: RunDescription) -> None:
    """Raises UserError where quantized weights would have to be trained, and for a form that needs calibration."""
    form, adapter = run.config.quant, run.config.adapter
    quantizer = quant.form_of(form, "config.quant")
    if not rounds(quantizer):
        return
    if not run.method.learnt:
        raise UserError(
            f"config.quant = {form!r} with config.adapter = {adapter!r}: rounded weights cannot learn; take an adapter "
            "such as 'lora(rank=8)', or config.quant = 'float32'"
        )
    if quantizer.calibrated:
        raise UserError(f"config.quant = {form!r}: tuning rounds to the nearest; take 'nf4()', 'int4()' or 'int8()'")


def with_captions(run: RunDescription) -> RunDescription:
    """Returns the description of a model that reads the states of captions, of as many tokens as their source gives.

    Raises UserError for a model that reads texts without a source, for a source without a model that does, and for one
    that does not fit.
    """
    source = run.config.text_states
    if run.objective.reads == "text":
        if source:
            raise UserError(f"config.text_states = {source!r}: a language model reads tokens; leave it out")
        return run
    if not source:
        if not run.outline.text_length:
            return run
        raise UserError(
            "config.text_states = '': the model reads texts; name what encodes captions, 'encoders()' of the model's "
            "pipeline, or 'folder(path=...)'"
        )
    return dataclasses.replace(run, text_length=run.states_shape([""]).tokens)


def check_length(run: RunDescription) -> None:
    """Raises UserError for rows longer than the positions of the model, or of the checkpoint it starts from."""
    length, max_positions = run.config.train.length, run.max_positions
    if run.objective.reads != "text":  # pictures have one length
        return
    model.check_length(run.outline, length, f"config.train.length = {length}")
    if max_positions and length > max_positions:
        raise UserError(
            f"config.train.length = {length}: {run.config.model.pretrained} has {max_positions} positions; "
            f"take {max_positions} tokens at most"
        )


def check_latents(run: RunDescription) -> None:
    """Raises UserError for a checkpoint of latents whose autoencoder is missing or that of another model."""
    if run.objective.reads == "images" and run.source is not None:
        check_autoencoder(run.outline, run.autoencoder, run.autoencoder_spec)


def check_rows(train: Config) -> None:
    """Raises UserError for counts below 1, and for a batch that `accumulate` does not divide."""
    for key in ("steps", "batch_size", "length", "accumulate", "log_every"):
        if train[key] < 1:
            raise UserError(f"config.train.{key} = {train[key]}: must be at least 1")
    if train.batch_size % train.accumulate:
        raise UserError(
            f"config.train.accumulate = {train.accumulate}: must divide config.train.batch_size = {train.batch_size}"
        )


def check_train(train: Config, mesh: Mesh, objective: Objective = NEXT_TOKEN) -> None:
    """Raises UserError for a batch, length or schedule that cannot be trained on `mesh`."""
    check_rows(train)
    rows, shards = train.batch_size // train.accumulate, sharding.count_row_shards(mesh)
    if rows % shards:
        raise UserError(
            f"config.train.batch_size = {train.batch_size}: {rows} rows a micro-batch do not divide over the "
            f"{shards} devices of the mesh axes data, fsdp and expert; {rows + -rows % shards} would"
        )
    if objective.reads == "text" and train.length % mesh.shape["sequence"]:
        raise UserError(
            f"config.train.length = {train.length}: the mesh axis sequence divides a row's tokens over "
            f"{mesh.shape['sequence']} devices; {train.length + -train.length % mesh.shape['sequence']} would do"
        )
    from_config.schedule(train)


def training_lm(run: RunDescription, row_slots: int | None = None) -> typing.Any:
    """The LM that is trained: that of the RunDescription, unrolled (no scan over layers) where the method asks for it.

    `row_slots` are the slots of patches of a row, where no data say how many. Raises UserError as `check_form` and
    `check_length` do, and for a model that the tuning method does not support.
    """
    check_form(run)
    check_length(run)
    run.method.check(run.lm)
    run.objective.check(run.lm)
    _check_new_parts(run)
    if row_slots is not None:
        lm = run.lm.clone(row_slots=row_slots)
    else:
        lm = run.dataset.model(run.lm) if run.has_pictures else run.lm
    return lm.clone(scan=False) if run.method.unrolled else lm


def _check_new_parts(run):
    """Raises UserError where parts that the checkpoint lacks would stay random."""
    if not run.new_parts:
        return
    boxed = model.abstract_params(run.lm)
    frozen = [
        path
        for path, _, _ in formulas.leaves({name: boxed[name] for name in run.new_parts})
        if not run.method.trains(path, run.lm)
    ]
    if frozen:
        raise UserError(
            f"config.adapter = {run.config.adapter!r}: {run.config.model.pretrained} has no {run.new_parts[0]} tower, "
            "and a random one would stay so; first train it, with \"freeze(train='^vision/')\", then tune that run's "
            "folder"
        )
