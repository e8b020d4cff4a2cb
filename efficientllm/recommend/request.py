"""What is asked: a model, a device and how many, a task, limits; and the command lines of its candidates."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import typing
from collections.abc import Mapping, Sequence

from efficientllm import main, registry, weights
from efficientllm.architecture import text_encoders
from efficientllm.errors import UserError, did_you_mean
from efficientllm.plan import hardware as hardwares
from efficientllm.plan import workloads
from efficientllm.plan.hardware import Hardware
from efficientllm.record import provenance
from efficientllm.report.query import Query
from efficientllm.typing import Config

TASKS = ("pretrain", "tune", "infer")
HERE = "here"
PRESETS = {"pretrain": "configs/base.py", "tune": "configs/tune.py", "infer": "configs/infer.py"}
# Checkpoints of the shapes that have a size's name: those of Qwen2.5 (architecture.sizes).
PUBLISHED = {size: f"Qwen/Qwen2.5-{size.upper()}" for size in ("0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b")}
UNTIED = ("7b", "14b", "32b", "72b")
Changes = dict[str, typing.Any]  # values by config key, without `config.`


@dataclasses.dataclass(frozen=True)
class Request:
    """A question.

    model:    the name of a size, or a value of `config.model.pretrained`.
    is_here:  whether `hardware` is this machine's.
    extra:    flags `--config.key=value`, which hold for every candidate.
    """

    task: str
    model: str
    hardware: Hardware
    devices: int
    is_here: bool
    query: Query
    extra: tuple[str, ...] = ()

    @property
    def is_size(self) -> bool:
        return self.model in size_names()

    @property
    def fixed(self) -> frozenset[str]:
        """The keys that `extra` sets."""
        _, overrides = main.split(list(self.extra))
        return frozenset(path.removeprefix("config.") for path, _ in overrides)

    @property
    def precision(self) -> str:
        """The precision that candidates have unless another is asked for; that of inference is the presets' own.

        Training is float32 on CPUs, as in the base config, and elsewhere what the device has units for.
        """
        if self.task == "infer":
            return weights.AUTO
        return "float32" if self.hardware.platform == "cpu" else self._chosen

    @functools.cached_property
    def _chosen(self):
        with workloads.compile_target(self.hardware.platform, self.hardware.capability):
            return weights.choose_precision().chosen

    @property
    def preset_precision(self) -> str:
        """The precision of the task's preset on the device."""
        precision = self.preset.model.precision
        return self._chosen if precision == weights.AUTO else precision

    @functools.cached_property
    def preset(self) -> Config:
        """The config of the task's first preset, with the model and what `extra` sets. Raises UserError."""
        return self.config(PRESETS[self.task], {})

    @property
    def memory_bytes(self) -> float:
        """Memory of a device, or the limit on it where that is less."""
        limits = [c.absolute for c in self.query.conditions if c.key == "peak_memory_bytes" and c.sign in ("<=", "<")]
        return min([self.hardware.memory_bytes, *(limit for limit in limits if limit is not None)])

    @property
    def device(self) -> str:
        """The devices as reports name them, such as `1 x NVIDIA H100 80GB HBM3`."""
        if self.hardware.platform != "cpu":
            return f"{self.devices} x {self.hardware.device_kind}"
        processor = provenance.processor()
        return f"1 x {processor['name'] or 'cpu'}, {processor['cores']} cores"

    def model_flags(self, to_run: bool) -> Changes:
        """The keys that name the model: a size's shapes in a plan, the checkpoint that has them `to_run`."""
        if not self.is_size:
            return {"model.pretrained": self.model}
        if to_run and self.task != "pretrain":
            return {"model.pretrained": PUBLISHED[self.model]}
        return {"model.pretrained": "", "model.size": self.model} | (
            {"model.tied": False} if self.model in UNTIED else {}
        )

    def argv(self, config: str, changes: Mapping[str, typing.Any], to_run: bool = False) -> list[str]:
        """The arguments of a candidate's command line; what `extra` sets is left to it."""
        own = {} if self.task == "infer" else {"model.precision": self.precision}
        own |= self.model_flags(to_run) | dict(changes)
        if self.devices == 1:
            own.pop("mesh", None)
        shown = {key: value for key, value in own.items() if key not in self.fixed and not _is_default(key, value)}
        flags = [f"--config.{key}={value if isinstance(value, str) else repr(value)}" for key, value in shown.items()]
        return [f"--config={config}", *flags, *self.extra]

    def config(self, config: str, changes: Mapping[str, typing.Any]) -> Config:
        """The config of a candidate, with the model's shapes. Raises UserError."""
        return main.parse(self.argv(config, changes))[0]


def _is_default(key, value):
    """Whether a flag would say what every preset says already."""
    return (key, value) in (("model.precision", "float32"), ("model.remat", "none"), ("train.accumulate", 1)) or (
        (key, value) == ("model.kv_cache", "activation")
    )


def size_names() -> list[str]:
    """The names of sizes of language models."""
    sizes = [name for name in registry.names("size") if name != "custom" and name not in text_encoders.PUBLISHED]
    return [name for name in sizes if registry.build("size", name).patch is None]


def make_request(task: str, model: str, device: str, devices: int, query: Query, extra: Sequence[str] = ()) -> Request:
    """Checks what is asked and looks the device up. Raises UserError."""
    if task not in TASKS:
        raise UserError(f"--task={task}: is none of {', '.join(TASKS)}{did_you_mean(task, TASKS)}")
    if task == "pretrain" and model not in size_names():
        raise UserError(f"--model={model}: pre-training begins without weights; name a size: {', '.join(size_names())}")
    if task != "pretrain" and model in size_names() and model not in PUBLISHED:
        raise UserError(
            f"--model={model}: no weights of that size are published; name a folder, a hub id, smollm2-135m, or a "
            f"size of {', '.join(PUBLISHED)}"
        )
    if not 1 <= devices <= 2**14:
        raise UserError(f"--devices={devices}: must be at least 1 and at most {2**14:,}")
    hardware, is_here = _find_hardware(device, devices)
    hardwares.check_count(hardware, devices)
    request = Request(task, model, hardware, devices, is_here, query, tuple(extra))
    _check_extra(request)
    return request


def _find_hardware(device, devices):
    """`(hardware, whether it is this machine's)`. Raises UserError."""
    if device != HERE:
        try:
            return hardwares.find(device, devices), device == "cpu"
        except UserError as error:
            raise UserError(str(error).replace("config.plan.hardware", "--device")) from None
    import jax

    kind = jax.devices()[0]
    if kind.platform == "cpu":
        return hardwares.find("cpu", devices), True
    try:
        return hardwares.find(kind.device_kind, devices), True
    except UserError:
        raise UserError(
            f"--device=here: nothing is known of {kind.device_kind!r}; write what is into a .json file and name that"
        ) from None


def _check_extra(request):
    """Raises UserError for a flag that no candidate can have."""
    for flag in request.extra:
        if not flag.startswith("--config."):
            raise UserError(f"{flag}: is not a flag; write --config.key=value")
    _ = request.preset


def batch_changes(task: str, batch: str) -> Changes:
    """The keys behind the batch of a report's group, such as `4 x 128 tokens a step`; empty if it does not say."""
    if task != "infer":
        match = re.match(r"(\d+) x (\d+) tokens", batch)
        return {"train.batch_size": int(match[1]), "train.length": int(match[2])} if match else {}
    keys = ("batch_size", "prompt_length", "max_new_tokens")
    matches = {key: re.search(rf"\b{key} (\d+)", batch) for key in keys}
    return {f"infer.{key}": int(match[1]) for key, match in matches.items() if match}


def distance(asked: float, measured: float) -> float:
    """How far apart two numbers of parameters are, as a factor of at least 1."""
    return math.exp(abs(math.log(asked / measured)))
