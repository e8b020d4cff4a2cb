"""Setup of a training run: data, abstract state and compiled steps. Cheap checks of the config come first."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
import typing
from collections.abc import Callable
from concurrent import futures

import flax.linen as nn
import jax

from efficientllm import model, sharding
from efficientllm.adapters.base import Method
from efficientllm.cost import device_peaks, jaxpr_flops, step_memory
from efficientllm.metrics import host, memory
from efficientllm.metrics.reading import Reading, missing
from efficientllm.quant import apply as quant
from efficientllm.registry import complete_spec
from efficientllm.run_description import describe_run
from efficientllm.runtime import compile_cache, malloc
from efficientllm.runtime import kernel_choice as kernels
from efficientllm.train import config_checks, extra_eval_data, step
from efficientllm.train.programs import of_batch, step_of_batch
from efficientllm.typing import Batch, Config, Mesh, PyTree, Record
from efficientllm.weights import activation_dtype, box_as

if typing.TYPE_CHECKING:
    from efficientllm.convert.source import Source


@dataclasses.dataclass
class Setup:
    """Everything that a training run needs before its first step. `compile_steps` sets the fields with defaults.

    objective_spec: what the objective was built from, also where the config says `pretrained`.
    dataset:       the data of the objective (`data.text.TextData` and the like).
    also_batches:  of the held-out text of `config.eval.also`.
    lm:            the model; of data in several buckets, at the size of the largest.
    models:        it at the size of each bucket, `lm` first, for each of which there is a program.
    length:        tokens of a row of `lm`.
    method:        the tuning method: which parameters are trainable.
    source:        the checkpoint that training starts from, or None.
    boxed:         abstract parameters of the model without adapters, boxed with their logical axes.
    shaped:        the abstract TrainState, each leaf with its sharding.
    shardings:     the shardings alone, for `jax.jit`.
    new_parts:     first names of the parameters that the source lacks.
    data:          the row's description of the data.
    rss_before:    resident bytes of the process before any array of the model is made.
    program_flops: of the compiled step, for each of `models`.
    program_memory: of the compiled step, that of the largest program.
    step_programs: the compiled step, for each of `models`.
    program_loads: programs of the step that an earlier run has compiled (`runtime.compile_cache`).
    """

    config: Config
    mesh: Mesh
    objective: typing.Any
    objective_spec: str
    dataset: typing.Any
    lm: typing.Any
    models: tuple[typing.Any, ...]
    length: int
    batches: typing.Any
    eval_batches: typing.Iterable
    also_batches: typing.Iterable
    method: Method
    source: Source | None
    boxed: PyTree
    shaped: step.TrainState
    shardings: step.TrainState
    new_parts: tuple[str, ...]
    data: Record
    rss_before: int
    compile_s: dict[str, float] = dataclasses.field(default_factory=dict)
    step_programs: tuple[jax.stages.Compiled, ...] = ()
    program_loads: int = 0
    kernels: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    program_flops: tuple[Reading, ...] = (missing("FLOP", "the run ended before compilation"),)
    program_memory: Reading = missing("bytes", "the run ended before compilation")
    _activations: dict[int, int] = dataclasses.field(default_factory=dict)

    @property
    def batch_size(self) -> int:
        return self.config.train.batch_size

    @property
    def batch_shardings(self) -> dict[str, jax.NamedSharding]:
        """The sharding of each array of a batch."""
        return self.objective.batch_shardings(self.lm, self.mesh)

    def activation_bytes(self, program: int = 0) -> int:
        """`step_memory.activation_bytes` of a micro-batch of the model of `models` at `program`; traced once."""
        if program not in self._activations:
            lm, rows = self.models[program], self.batch_size // self.config.train.accumulate
            length = lm.row_length(self.config.train.length)
            self._activations[program] = step_memory.activation_bytes(lm, self.shaped, rows, length, self.objective)
        return self._activations[program]

    @property
    def objective_facts(self) -> Record:
        """Provenance of a tuned diffusion model: its objective, which its config need not say, with every field."""
        if self.source is None or self.objective.reads != "images":
            return {}
        fields = {field.name: field.default for field in dataclasses.fields(self.objective)}
        del fields["autoencoder"]  # a key of its own
        return {"objective": complete_spec("objective", self.objective_spec, fields)}


def prepare(config: Config, log: logging.Logger) -> Setup:
    """Builds the Setup of a config: reads the data, makes no array of the model. Raises UserError."""
    description = config_checks.with_captions(describe_run(config))
    config_checks.check_form(description)
    config_checks.check_latents(description)
    if config.model.pretrained:  # check the data before opening a checkpoint, which can take a minute
        _check_data(description, log)
    # Builds `description.outline`: a bad model is refused before any data is read.
    config_checks.check_length(description)
    config_checks.check_train(config.train, description.mesh, description.objective)
    if description.source is None:
        _check_data(description, log)
    lm, mesh, dataset = config_checks.training_lm(description), description.mesh, description.dataset
    models = description.batch_models(lm)
    if config.train.accumulate > 1 and any(block.ffn and block.ffn.has_batch_loss for block in model.parts(lm)):
        rows = config.train.batch_size // config.train.accumulate
        log.info(f"config.train.accumulate: load-balance losses are those of micro-batches of {rows} rows, averaged")
    share: dict[str, typing.Any] = dict(
        zip(("process_index", "process_count"), sharding.process_share(mesh), strict=True)
    )
    rows = config.train.batch_size
    boxed = model.abstract_params(lm)
    shaped, shardings = step.abstract_state(lm, config, boxed, description.method, mesh)
    return Setup(
        config=config,
        mesh=mesh,
        objective=description.objective,
        objective_spec=description.objective_spec,
        dataset=dataset,
        lm=lm,
        models=models,
        length=description.length,
        batches=iter(dataset.train(rows, config.seed, **share)),
        eval_batches=dataset.held_out(rows, **share, limit=config.eval.batches or None),
        also_batches=extra_eval_data.held_out_batches(config, dataset, share),
        method=description.method,
        source=description.source,
        boxed=boxed,
        shaped=shaped,
        shardings=shardings,
        new_parts=description.new_parts,
        data=_describe_data(config, dataset, log),
        rss_before=host.rss_bytes(),
    )


def _check_data(description, log):
    """Reads and logs the data. Raises UserError for bad data."""
    config = description.config
    tokenizer = f", tokenizer: {config.tokenizer}" if description.objective.reads == "text" else ""
    log.info(f"data: {config.data}{tokenizer}")
    for note in description.notes_on_data():
        log.info(f"data: {note}")


def _describe_data(config, dataset, log):
    """The row's description of the data; logs how many records are truncated, and what rows with pictures hold."""
    summary = dataset.describe()
    for split in ("train", "held_out"):
        if summary.get(f"{split}_cut"):
            total = summary[f"{split}_documents"]
            log.info(
                f"{split.replace('_', ' ')}: {summary[f'{split}_cut']} of {total} records are longer than "
                f"{config.train.length} tokens, and cut there"
            )
    if "slot_fill" in summary:
        log.info(
            f"data: {summary['token_fill']:.0%} of {config.train.length:,} tokens of a row and "
            f"{summary['slot_fill']:.0%} of {summary['row_slots']:,} slots of patches are filled"
        )
    if summary.get("left_out"):
        log.info(f"data: {summary['left_out']} examples whose images or answers do not fit into a row are left out")
    return summary


def create_state(setup: Setup) -> step.TrainState:
    """Makes the sharded TrainState before the first step: of a new model, or from a checkpoint's parameters."""
    train, seed, method, form = setup.config.train, setup.config.seed, setup.method, setup.config.quant
    if setup.source is None:
        return step.jit_create(setup.lm, train, seed, setup.length, setup.shardings, method, form)()
    loaded = {name: boxed for name, boxed in setup.boxed.items() if name not in setup.new_parts}
    abstract_params = sharding.abstract_shards(loaded, setup.mesh)
    lm = setup.lm.language_model() if setup.new_parts else setup.lm
    params = setup.source.load(abstract_params, lm=lm, transform=quant.rounder(form, quant.UNROUNDED))

    def create_from(params):
        params = box_as(loaded, params)
        if setup.new_parts:
            new = model.init_params(setup.lm, jax.random.key(seed), setup.length)
            params |= {name: new[name] for name in setup.new_parts}
        return nn.unbox(step.create(setup.lm, train, method, seed, setup.boxed, params, form))

    state = jax.jit(create_from, out_shardings=setup.shardings, donate_argnums=0)(params)
    malloc.trim()
    return state


def compile_steps(setup: Setup, background: futures.Executor) -> tuple[Callable, futures.Future[Callable]]:
    """Compiles the train step -> `(train step, future eval step)`, which `background` compiles.

    Sets the setup's compile times, kernels, program FLOPs and memory.
    """
    programs = [_compile_for(setup, index) for index in range(len(setup.models))]
    setup.step_programs = tuple(program.train for program in programs)
    setup.compile_s = {key: sum(program.seconds[key] for program in programs) for key in ("lower", "compile")}
    setup.program_loads = sum(program.loads for program in programs)
    # The result is cached on the host; measured here so that it never runs between steps.
    device_peaks.measure_gemm_peak(activation_dtype(setup.lm.precision).name)
    device_peaks.measure_copy_bandwidth()
    setup.program_flops = tuple(_program_flops(program.jaxpr) for program in programs)
    setup.program_memory = _program_memory([program.train for program in programs])
    setup.kernels = {
        operation: sorted(set().union(*(program.kernels.get(operation, ()) for program in programs)))
        for operation in dict.fromkeys(itertools.chain.from_iterable(program.kernels for program in programs))
    }
    malloc.trim()
    batches = [program.batch for program in programs]
    evaluate = background.submit(lambda: of_batch([program.eval.compile() for program in programs], batches))
    return step_of_batch(setup.step_programs, batches), evaluate


class _Programs(typing.NamedTuple):
    """The steps for the batches of one size: that of training compiled, that of evaluation lowered."""

    batch: Batch
    train: jax.stages.Compiled
    eval: jax.stages.Lowered
    jaxpr: typing.Any
    kernels: dict[str, set[str]]
    seconds: dict[str, float]
    loads: int


def _compile_for(setup, index):
    lm, objective, shardings = setup.models[index], setup.objective, setup.shardings
    batch = objective.batch_shapes(lm, setup.batch_size, setup.length, setup.mesh)
    name = f"train_step_{index}" if index else "train_step"
    train = step.jit_train_step(lm, setup.config.train, setup.mesh, shardings, setup.method, objective, name)
    evaluate = step.jit_eval_step(lm, setup.mesh, shardings.eval_params, objective)
    begin = time.perf_counter()
    with kernels.recording_kernels() as used:
        traced = train.trace(setup.shaped, batch)
        lowered = traced.lower()
    lowered_at, loads_before = time.perf_counter(), compile_cache.loads()
    compiled = lowered.compile()
    seconds = {"lower": lowered_at - begin, "compile": time.perf_counter() - lowered_at}
    loads = compile_cache.loads() - loads_before
    lowered_eval = evaluate.lower(setup.shaped.eval_params, batch, held_out_table(setup))
    return _Programs(batch, compiled, lowered_eval, traced.jaxpr, used, seconds, loads)


def _program_flops(jaxpr):
    try:
        return Reading(
            jaxpr_flops.count_program_flops(jaxpr), "FLOP", "products of a step's program, counted in its jaxpr"
        )
    except ValueError as error:
        return missing("FLOP", str(error))


def _program_memory(programs):
    totals = [memory.compiled_memory(compiled).get("total_bytes") for compiled in programs]
    if None in totals:
        return missing("bytes", "the compiler gives no plan of memory")
    largest = max(totals) * jax.local_device_count()
    return Reading(largest, "bytes", "compiler's plan of a step, over this process's devices")


def predicted_memory(setup: Setup) -> Reading:
    """Memory of a step estimated from shapes (`cost.step_memory`), over this process's devices, as a Reading."""
    config = setup.config.train
    rows = config.batch_size // config.accumulate
    token_shards = sharding.count_row_shards(setup.mesh) * setup.mesh.shape["sequence"]
    device_bytes = step_memory.predicted_bytes(
        setup.lm, setup.shaped, rows, setup.length, token_shards, setup.objective, setup.activation_bytes()
    )
    total = device_bytes * jax.local_device_count()
    return Reading(total, "bytes", "shapes: parameters, optimiser, gradients, activations; over this process's devices")


def held_out_table(setup: Setup) -> PyTree:
    """`Objective.held_out_table`, replicated on the mesh."""
    table = setup.objective.held_out_table(setup.lm, setup.dataset)
    return jax.device_put(table, sharding.replicated(setup.mesh))
