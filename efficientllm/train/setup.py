"""Everything a training run needs before its first step, built from the config in the order that finds errors first."""

import dataclasses
import time

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm import data, model, sharding
from efficientllm.architecture import from_config
from efficientllm.cost import device_peaks, jaxpr_flops, step_memory
from efficientllm.errors import UserError
from efficientllm.metrics import host, memory
from efficientllm.metrics.reading import Reading, missing
from efficientllm.objectives import next_token
from efficientllm.optim import rules
from efficientllm.quant import apply as quant
from efficientllm.registry import build
from efficientllm.runtime import kernel_choice as kernels
from efficientllm.runtime import malloc
from efficientllm.train import step
from efficientllm.weights import activation_dtype, box_as


@dataclasses.dataclass
class Setup:
    """The parts of a run.

    `shaped` is the abstract TrainState on its shardings; `boxed` are the plain model's abstract parameters with their
    axes; `method` says what learns; `source` is the checkpoint the model comes from, or None; `data` is what the row
    says of the data.
    """

    config: object
    mesh: object
    tokenizer: object
    lm: object
    batches: object
    eval_batches: object
    method: object
    source: object
    boxed: dict
    shaped: step.TrainState
    shardings: step.TrainState
    data: dict
    rss_before: int
    compile_s: dict = dataclasses.field(default_factory=dict)
    kernels: dict = dataclasses.field(default_factory=dict)
    program_flops: Reading = missing("FLOP", "the run ended before compilation")
    program_memory: Reading = missing("bytes", "the run ended before compilation")

    @property
    def length(self):
        return self.config.train.length

    @property
    def batch_size(self):
        return self.config.train.batch_size


def prepare(config, log):
    """Reads the data and describes the model; makes no array of it. Raises UserError."""
    method = build("adapter", config.adapter, where="config.adapter")
    check_form(config.quant, config.adapter, method)
    if config.model.pretrained:  # reading it can take a minute
        _check_data(config, log)
    source = open_pretrained(config.model.pretrained)
    model_config = described(config.model, source)
    lm = from_config.check(model_config)  # a bad model is refused before any data is read
    model.check_length(lm, config.train.length, f"config.train.length = {config.train.length}")
    check_positions(config, source)
    mesh = sharding.make_mesh(config.mesh)
    check_train(config.train, mesh)
    if source is None:
        _check_data(config, log)
    tokenizer = tokenizer_of(config, source)
    lm = _for_method(from_config.from_config(model_config, tokenizer.vocab_size), method)
    _check_sample(lm, config.sample, tokenizer)
    if config.train.accumulate > 1 and any(ffn is not None and ffn.has_batch_loss for _, ffn in model.parts(lm)):
        rows = config.train.batch_size // config.train.accumulate
        log.info(f"config.train.accumulate: load-balance losses are those of micro-batches of {rows} rows, averaged")
    share = dict(zip(("process_index", "process_count"), sharding.process_share(mesh), strict=True))
    rows = (config.data, tokenizer, config.train.batch_size, config.train.length)
    with jax.set_mesh(mesh):
        boxed = model.abstract_params(lm)
        init = step.init_state(lm, config.train, config.seed, config.train.length, method, config.quant)
        abstract = jax.eval_shape(init)
    shardings = sharding.shardings(abstract, mesh)
    return Setup(
        config=config,
        mesh=mesh,
        tokenizer=tokenizer,
        lm=lm,
        batches=iter(data.train_iterator(*rows, seed=config.seed, **share)),
        eval_batches=data.eval_batches(*rows, limit=config.eval.batches or None, **share),
        method=method,
        source=source,
        boxed=boxed,
        shaped=sharding.on_shards(abstract, mesh),
        shardings=shardings,
        data=_described_data(config, tokenizer, log),
        rss_before=host.rss_bytes(),
    )


def _check_data(config, log):
    """Reads the data, and says what was read. Raises UserError for what is wrong with it."""
    log.info(f"data: {config.data}, tokenizer: {config.tokenizer}")
    for note in data.check(config.data):
        log.info(f"data: {note}")


def _described_data(config, tokenizer, log):
    found = data.describe(config.data, tokenizer, config.train.length)
    for side in ("train", "held_out"):
        if found.get(f"{side}_cut"):
            total = found[f"{side}_documents"]
            log.info(
                f"{side.replace('_', ' ')}: {found[f'{side}_cut']} of {total} records are longer than "
                f"{config.train.length} tokens, and cut there"
            )
    return found


def create_state(run):
    """The TrainState before the first step, on its shardings: of a new model, or around a checkpoint's parameters."""
    train, seed, method, form = run.config.train, run.config.seed, run.method, run.config.quant
    if run.source is None:
        return step.jit_create(run.lm, train, seed, run.length, run.shardings, method, form)()
    shaped = sharding.on_shards(run.boxed, run.mesh)
    params = run.source.load(shaped, lm=run.lm, each=quant.rounder(form, step.AS_THEY_ARE))

    def around(params):
        return nn.unbox(step.create(run.lm, train, method, seed, run.boxed, box_as(run.boxed, params), form))

    return jax.jit(around, out_shardings=run.shardings, donate_argnums=0)(params)


def check_form(form, adapter, method):
    """Refuses weights that are rounded where nothing but them could learn. Raises UserError."""
    found = quant.form_of(form)
    if not hasattr(found, "leaf"):
        return
    if not method.learnt:
        raise UserError(
            f"config.quant = {form!r} with config.adapter = {adapter!r}: rounded weights cannot learn; take an adapter "
            "such as 'lora(rank=8)', or config.quant = 'float32'"
        )
    if getattr(found, "calibrated", False):
        raise UserError(f"config.quant = {form!r}: tuning rounds to the nearest; take 'nf4()', 'int4()' or 'int8()'")


def check_positions(config, source):
    """Refuses rows that are longer than what the checkpoint was made for."""
    most = source.max_positions if source else None
    if most and config.train.length > most:
        raise UserError(
            f"config.train.length = {config.train.length}: {config.model.pretrained} has {most} positions; take "
            f"{most} tokens at most"
        )


def open_pretrained(pretrained, weights=True):
    """The checkpoint `config.model.pretrained` names, or None for none; without `weights` it is only described."""
    if not pretrained:
        return None
    from efficientllm import convert  # not needed by every run

    return convert.open_source(pretrained, weights)


def described(model, source):
    """`config.model` with what a checkpoint's files say of it."""
    if source is None:
        return model
    complete = model.copy_and_resolve_references()
    complete.update(source.model | {"pattern": tuple(source.model.get("pattern", ())), "parameters_of": ""})
    return complete


def tokenizer_of(config, source):
    """The tokenizer of `config.tokenizer`, within the checkpoint's vocabulary. Raises UserError."""
    if config.tokenizer != "pretrained":
        found = data.build_tokenizer(config.tokenizer, config.data)
    elif source is None:
        raise UserError("config.tokenizer = 'pretrained' needs config.model.pretrained, the checkpoint it belongs to")
    else:
        found = data.build_tokenizer(source.tokenizer(), config.data)
    return found if source is None else found.within(source.lm().vocab_size)


def _for_method(lm, method):
    method.check(lm)
    return lm.clone(scan=False) if method.unrolled else lm


def _check_sample(lm, sample, tokenizer):
    """Refuses a sample that the model could not write at the end of the run."""
    prompt = len(tokenizer.encode_prompt(sample.prompt))
    where = f"config.sample.tokens = {sample.tokens} after a prompt of {prompt}"
    model.check_length(lm, prompt + sample.tokens, where)


def check_rows(train):
    """Refuses counts that cannot be. Raises UserError naming the key."""
    for key in ("steps", "batch_size", "length", "accumulate", "log_every"):
        if train[key] < 1:
            raise UserError(f"config.train.{key} = {train[key]}: must be at least 1")
    if train.batch_size % train.accumulate:
        raise UserError(
            f"config.train.accumulate = {train.accumulate}: must divide config.train.batch_size = {train.batch_size}"
        )


def check_train(train, mesh):
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


def compile_steps(setup):
    """The compiled (train, eval) steps. Fills in the setup's compile times and kernels, and what the program of a
    step costs."""
    batch = step_memory.batch_shapes(setup.batch_size, setup.length, sharding.batch_sharding(setup.mesh))
    train = step.jit_train_step(setup.lm, setup.config.train, setup.mesh, setup.shardings, setup.method)
    evaluate = step.jit_eval_step(setup.lm, setup.mesh, setup.shardings.all_params)
    begin = time.perf_counter()
    with kernels.recording() as used:
        traced = train.trace(setup.shaped, batch)
        lowered = traced.lower()
    lowered_at = time.perf_counter()
    compiled = lowered.compile()
    setup.compile_s = {"lower": lowered_at - begin, "compile": time.perf_counter() - lowered_at}
    device_peaks.measure_gemm_peak(
        activation_dtype(setup.lm.precision).name
    )  # at most once a host, and not between steps
    device_peaks.measure_copy_bandwidth()
    setup.program_flops, setup.program_memory = _program_flops(traced.jaxpr), _program_memory(compiled)
    setup.kernels = {operation: sorted(kinds) for operation, kinds in used.items()}
    token_bytes = jax.ShapeDtypeStruct((setup.lm.vocab_size,), jnp.float32, sharding=sharding.replicated(setup.mesh))
    compiled_eval = evaluate.lower(setup.shaped.all_params, batch, token_bytes).compile()
    malloc.give_back()
    return compiled, compiled_eval


def _program_flops(jaxpr):
    try:
        return Reading(
            jaxpr_flops.count_program_flops(jaxpr), "FLOP", "products of a step's program, counted in its jaxpr"
        )
    except ValueError as error:
        return missing("FLOP", str(error))


def _program_memory(compiled):
    total = memory.compiled_memory(compiled).get("total_bytes")
    if total is None:
        return missing("bytes", "the compiler gives no plan of memory")
    return Reading(total * jax.local_device_count(), "bytes", "compiler's plan of a step, over this process's devices")


def predicted_memory(setup):
    """Bytes of a step by `cost.step_memory`, over this process's devices, as a Reading."""
    config = setup.config.train
    rows = config.batch_size // config.accumulate
    ways = sharding.row_ways(setup.mesh) * setup.mesh.shape["sequence"]
    found = step_memory.predicted_bytes(setup.lm, setup.shaped, rows, setup.length, ways) * jax.local_device_count()
    return Reading(found, "bytes", "shapes: parameters, optimiser, gradients, activations; over this process's devices")


def token_bytes(setup):
    """UTF-8 bytes of each token of the vocabulary, on the devices."""
    return jax.device_put(next_token.bytes_of(setup.tokenizer, setup.lm), sharding.replicated(setup.mesh))
