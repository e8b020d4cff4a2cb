"""A training step as it would run: described from its config alone, and compiled without an array."""

import dataclasses
import re
import time

import flax.linen as nn
import jax

from efficientllm import accounting, architecture, kernels, model, sharding
from efficientllm.metrics import flops, memory
from efficientllm.plan import hlo, program
from efficientllm.registry import build
from efficientllm.train import footprint, setup, step

_USED = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT])")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step is: its model, method and mesh, and the abstract TrainState on its shardings."""

    config: object
    lm: object
    method: object
    mesh: object
    boxed: dict
    shaped: step.TrainState
    shardings: step.TrainState
    platform: str

    @property
    def rows(self):
        """Sequences of a micro-batch, and the number of ways their tokens are dealt out."""
        train, ways = self.config.train, sharding.row_ways(self.mesh) * self.mesh.shape["sequence"]
        return train.batch_size // train.accumulate, ways

    @property
    def model_flops(self):
        """FLOPs of a step by closed formula."""
        train = self.config.train
        return accounting.step_flops(self.lm, self.boxed, train.length, train.batch_size, self.method)

    def by_shapes(self):
        """Bytes of one device at the height of a step, by `train.footprint`."""
        with jax.set_mesh(self.mesh), kernels.compiling_for(self.platform):
            return footprint.predicted_bytes(self.lm, self.shaped, self.rows[0], self.config.train.length, self.rows[1])


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a step.

    memory:   `memory.compiled_memory`, bytes of one device; only `total_bytes` where the compiler refused.
    refused:  why it would not compile, or None.
    text:     the program.
    """

    memory: dict
    seconds: float
    text: str | None
    refused: str | None = None


def changed(config, changes):
    """A copy of the config with `{"model.remat": "full"}` changed."""
    copy = config.copy_and_resolve_references()
    copy.update_from_flattened_dict(changes)
    return copy


def model_of(config):
    """(lm, method) of a config. A size that names its vocabulary needs neither tokenizer nor checkpoint.

    Raises UserError as the run would.
    """
    method = build("adapter", config.adapter, where="config.adapter")
    setup.check_form(config.quant, config.adapter, method)
    if architecture.has_vocabulary(config.model):
        lm = architecture.from_config(config.model)
    else:
        source = setup.open_pretrained(config.model.pretrained, weights=False)
        described = setup.described(config.model, source)
        known = source is not None or architecture.has_vocabulary(described)
        lm = architecture.from_config(described, None if known else setup.tokenizer_of(config, source).vocab_size)
    model.check_length(lm, config.train.length, f"config.train.length = {config.train.length}")
    method.check(lm)
    return lm.clone(scan=False) if method.unrolled else lm, method


def whole_rows(config, mesh):
    """The config with the least batch from its own upwards that divides over the mesh."""
    setup.check_rows(config.train)
    parts = config.train.accumulate * sharding.row_ways(mesh)
    size = config.train.batch_size
    return config if size % parts == 0 else changed(config, {"train.batch_size": size + -size % parts})


def describe(config, devices, platform):
    """The Step of a config on `devices`, for the `platform` that it is compiled for."""
    mesh = sharding.make_mesh(config.mesh, devices)
    setup.check_train(config.train, mesh)
    with kernels.compiling_for(platform):
        lm, method = model_of(config)
        boxed = model.abstract_params(lm)  # makes a small array: not on devices that are not here
    with jax.set_mesh(mesh), kernels.compiling_for(platform):
        train = config.train
        abstract = jax.eval_shape(step.init_state(lm, train, config.seed, train.length, method, config.quant))
    shardings = sharding.shardings(abstract, mesh)
    shaped = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), nn.unbox(abstract), shardings
    )
    return Step(config, lm, method, mesh, boxed, shaped, shardings, platform)


def traced(one):
    """(the step traced for its platform, `{operation: kernels}` it chose)."""
    batch = footprint.batch_shapes(
        one.config.train.batch_size, one.config.train.length, sharding.batch_sharding(one.mesh)
    )
    jitted = step.jit_train_step(one.lm, one.config.train, one.mesh, one.shardings, one.method)
    with jax.set_mesh(one.mesh), kernels.compiling_for(one.platform), kernels.recording() as used:
        return jitted.trace(one.shaped, batch), {operation: sorted(kinds) for operation, kinds in used.items()}


def compile_step(one, trace):
    """The Compiled of a traced step; the compiler's refusal for want of memory is an answer, other errors raise."""
    begin = time.perf_counter()
    try:
        with jax.set_mesh(one.mesh), kernels.compiling_for(one.platform):
            done = trace.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(_used(str(error)), time.perf_counter() - begin, None, str(error).splitlines()[0])
    return Compiled(memory.compiled_memory(done), time.perf_counter() - begin, done.as_text())


def _used(message):
    found = _USED.search(message)
    return {"total_bytes": round(float(found[1]) * _UNITS[found[2]])} if found else {}


def program_flops(one, trace):
    """FLOPs of the products that a step executes, remat's twice, masked ones too; counted in its jaxpr.

    Where kernels hide theirs, those of the same step in plain products. None where neither can be counted.
    """
    for shown in (lambda: trace, lambda: _plain(one)):
        try:
            return flops.count_program_flops(shown().jaxpr)
        except ValueError:
            continue
    return None


def _plain(one):
    """The step traced in products that a jaxpr shows: dense attention, ragged products, scans of known length."""
    config = changed(one.config, {"model.attention_kernel": "xla"})
    return traced(describe(config, list(one.mesh.devices.flat), "tpu"))[0]


def read(compiled, count):
    """`(Collectives, moved bytes, custom calls)` of a compiled step's text."""
    found = hlo.Program(compiled.text)
    return program.collectives(found, count), program.moved_bytes(found), program.custom_calls(found)
