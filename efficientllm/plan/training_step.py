"""A training step as it would run: described from its config alone, and compiled without an array.

What can be planned is registered as `planned`: a Planned, whose `describe` gives a Step or what has its methods.
"""

import contextlib
import dataclasses
import re
import time
import typing

import jax

from efficientllm import model, sharding
from efficientllm.cost import formulas, jaxpr_flops, step_memory
from efficientllm.metrics import memory
from efficientllm.metrics.reading import Reading
from efficientllm.plan import collectives, cudnn, hlo_cost, hlo_text
from efficientllm.plan import remedies as changes
from efficientllm.registry import register
from efficientllm.run_description import describe_run
from efficientllm.runtime import kernel_choice as kernels
from efficientllm.train import step
from efficientllm.train.config_checks import check_rows, check_train, training_lm

_USED = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT])")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Planned(typing.NamedTuple):
    """One thing that is planned.

    whole:     `(config, mesh) -> config`, one whose rows divide over the mesh.
    describe:  `(config, devices, platform, capability)` -> what is planned, on a mesh of these devices.
    tasks:     whose measured rows calibrate it.
    """

    whole: object
    describe: object
    tasks: tuple


class Part(typing.NamedTuple):
    """A program of what is planned, traced.

    times:        how often it runs in a step, or a request.
    kernels:      `{operation: kernels}` that it chose.
    model_flops:  FLOPs of a run by closed formula.
    moved_bytes:  bytes that a run must move on a device by closed formula, or None.
    turns:        how often its outer loops run in what is counted as one run; None if the jaxpr says.
    """

    name: str
    times: int
    trace: object
    kernels: dict
    model_flops: float
    moved_bytes: float | None = None
    turns: int | None = None


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
    capability: tuple = (0, 0)

    def scope(self):
        """Where it is traced and compiled: its mesh, and kernels for its platform and compute capability."""
        return scope(self.mesh, self.platform, self.capability)

    @property
    def rows(self):
        """Sequences of a micro-batch, and the number of ways their tokens are dealt out."""
        train, ways = self.config.train, sharding.row_ways(self.mesh) * self.mesh.shape["sequence"]
        return train.batch_size // train.accumulate, ways

    @property
    def model_flops(self):
        """FLOPs of a step by closed formula."""
        train = self.config.train
        return formulas.step_flops(self.lm, self.boxed, train.length, train.batch_size, self.method)

    @property
    def samples(self):
        """Rows of a step."""
        return self.config.train.batch_size

    @property
    def heading(self):
        return f"{self.samples} x {self.config.train.length} tokens a step"

    def programs(self):
        """The Parts of what is planned."""
        return [Part("step", 1, *traced(self), self.model_flops)]

    def plain(self):
        """The same in products that a jaxpr shows: dense attention, ragged products, unrounded weights, scans of known
        length."""
        config = changed(self.config, {"model.attention_kernel": "xla", "quant": "float32"})
        return describe(config, list(self.mesh.devices.flat), "tpu")

    def sent_by_formula(self):
        """Its Collectives by closed formula, None where that does not hold."""
        return collectives.closed(self)

    def candidates(self):
        """The single changes that could make it fit (`plan.remedies`)."""
        return changes.of_training(self.config, self.mesh.shape)

    def rates(self, seconds):
        """The study's throughputs of a step that takes so long."""
        rate = self.samples / seconds / formulas.count_parameters(self.lm, self.boxed)["active"]
        return {"tt_tokens_per_param_s": rate * self.config.train.length, "st_samples_per_param_s": rate}

    def latencies(self, parts):
        """None: a step is all there is."""
        return {}

    no_rates: typing.ClassVar = ("tt_tokens_per_param_s", "st_samples_per_param_s")
    no_mcr: typing.ClassVar = "nothing is compressed in training"

    def readings(self):
        """What is known of the model and is no cost, as Readings."""
        learnt = sum(leaf.size for leaf in jax.tree.leaves(self.shaped.params))
        weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.shaped.all_params))
        formula = f"closed formula ({formulas.FLOP_CONVENTION})"
        return {
            "params_trainable": Reading(learnt, "1", "parameter tree"),
            "flops_per_token": Reading(self.model_flops / self.tokens, "FLOP", formula),
            "resident_weight_bytes": Reading(weights, "bytes", "parameter tree, over all devices"),
        }

    @property
    def tokens(self):
        """Tokens of a step."""
        return self.samples * self.config.train.length

    def by_shapes(self):
        """Bytes of one device at the height of a step, by `cost.step_memory`."""
        with self.scope():
            return step_memory.predicted_bytes(
                self.lm, self.shaped, self.rows[0], self.config.train.length, self.rows[1]
            )


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


@contextlib.contextmanager
def target(platform, capability):
    """What is traced inside takes its kernels for the platform, of a GPU by its compute capability."""
    with kernels.compiling_for(platform, capability), cudnn.planned_for(capability):
        yield


@contextlib.contextmanager
def scope(mesh, platform, capability):
    """What is traced and compiled inside lies on `mesh` and takes its kernels for the platform."""
    with jax.set_mesh(mesh), target(platform, capability):
        yield


def changed(config, changes):
    """A copy of the config with `{"model.remat": "full"}` changed."""
    copy = config.copy_and_resolve_references()
    copy.update_from_flattened_dict(changes)
    return copy


def whole_rows(config, mesh):
    """The config with the least batch from its own upwards that divides over the mesh."""
    check_rows(config.train)
    parts = config.train.accumulate * sharding.row_ways(mesh)
    size = config.train.batch_size
    return config if size % parts == 0 else changed(config, {"train.batch_size": size + -size % parts})


def describe(config, devices, platform, capability=(0, 0)):
    """The Step of a config on `devices`, for the `platform` that it is compiled for, a GPU of this capability."""
    run = describe_run(config, devices, shapes_only=True)
    check_train(config.train, run.mesh)
    with target(platform, capability):
        lm = training_lm(run)
        shaped, shardings = step.abstract_state(lm, config, run.method, run.mesh)
        boxed = model.abstract_params(lm)
    return Step(config, lm, run.method, run.mesh, boxed, shaped, shardings, platform, capability)


def traced(one):
    """(the step traced for its platform, `{operation: kernels}` it chose)."""
    batch = step_memory.batch_shapes(
        one.config.train.batch_size, one.config.train.length, sharding.batch_sharding(one.mesh)
    )
    jitted = step.jit_train_step(one.lm, one.config.train, one.mesh, one.shardings, one.method)
    with one.scope(), kernels.recording_kernels() as used:
        return jitted.trace(one.shaped, batch), {operation: sorted(kinds) for operation, kinds in used.items()}


def compile_step(one, trace):
    """The Compiled of a traced step; the compiler's refusal for want of memory is an answer, other errors raise."""
    begin = time.perf_counter()
    try:
        with one.scope():
            done = trace.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(_used(str(error)), time.perf_counter() - begin, None, str(error).splitlines()[0])
    return Compiled(memory.compiled_memory(done), time.perf_counter() - begin, done.as_text())


def _used(message):
    found = _USED.search(message)
    return {"total_bytes": round(float(found[1]) * _UNITS[found[2]])} if found else {}


def program_flops(one, part):
    """FLOPs of the products that a Part executes, remat's twice, masked ones too; counted in its jaxpr.

    Where kernels hide theirs, those of the same in plain products. None where neither can be counted.
    """
    for parts in (lambda: [part], lambda: one.plain().programs()):
        try:
            found = next(each for each in parts() if each.name == part.name)
            return jaxpr_flops.count_program_flops(found.trace.jaxpr, part.turns)
        except ValueError:
            continue
    return None


def read(compiled, count):
    """`(Collectives, moved bytes, custom calls, launches)` of a compiled step's text."""
    found = hlo_text.Program(compiled.text)
    counted = hlo_cost.moved_bytes(found), hlo_cost.custom_calls(found), hlo_cost.launches(found)
    return hlo_cost.collectives(found, count), *counted


TRAINING = Planned(whole_rows, describe, ("pretrain", "tune"))
for task in ("pretrain", "tune"):
    register("planned", task)(TRAINING)
