"""Reads PEFT's adapter_config.json as the `config.adapter` of a method."""

import dataclasses
import functools
import math
import pathlib
import typing

from efficientllm.convert.peft import lora_file
from efficientllm.convert.peft.adapter_kinds import PARTS
from efficientllm.errors import UserError, short_repr
from efficientllm.registry import build, lookup, names, parse_spec, spec_parameters
from efficientllm.typing import PathLike
from efficientllm.untrusted import json_text, patterns

CONFIG = "adapter_config.json"
MOST = 1e6  # the largest rank, alpha or dropout that is read
# Keys that change what is computed, with the only value of each that is supported.
NEUTRAL = {
    "bias": "none", "fan_in_fan_out": False, "lora_bias": False, "layer_replication": None,
    "trainable_token_indices": None, "target_parameters": None, "use_qalora": False, "use_bdlora": None,
    "arrow_config": None, "alora_invocation_tokens": None, "kasa_config": None,
    "monteclora_config": None, "ensure_weight_tying": False,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of an adapter folder.

    Args:
      name: the registered name of the method.
      rank, alpha, dropout: the method's parameters.
      ranks, alphas: exceptions, by a regex that matches a module's name or the end of it.
      kind: `peft_type` (`adapter_kinds.PARTS`).
      saved: `modules_to_save`: endings of the names of modules that are trained and saved whole.
    """

    name: str
    rank: int
    alpha: float
    dropout: float
    ranks: dict
    alphas: dict
    kind: str = "LORA"
    saved: tuple = ()

    @property
    def spec(self) -> str:
        """The `config.adapter` of modules without exceptions."""
        return self._spec(self.rank, self.alpha)

    def _spec(self, rank, alpha):
        fields = spec_parameters(lookup("adapter", self.name))
        values = {"rank": rank, "alpha": alpha, "dropout": self.dropout}
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in values.items() if key in fields)})"

    def method_of(self, module: str | None = None) -> typing.Any:
        """The method of a module's adapter; None is a module without exceptions."""
        alpha = self.alpha if module is None else _of(self.alphas, module, self.alpha)
        return _method(self._spec(self.rank if module is None else self.rank_of(module), alpha))

    def has_pattern(self, module: str) -> bool:
        """Whether a rank or an alpha is given for a module by its name."""
        return any(_ending(key).fullmatch(module) for key in (*self.ranks, *self.alphas))

    def rank_of(self, module: str) -> int:
        """The rank of a module's adapter."""
        return _of(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        """The factor of the low-rank product: alpha / `scale_divisor`."""
        if self.kind == "GLORA":
            return 1.0
        options = lookup("adapter", self.name).peft.options
        return _of(self.alphas, module, self.alpha) / scale_divisor(options, self.rank_of(module))


def scale_divisor(options: dict[str, typing.Any], rank: int) -> float:
    """What PEFT divides alpha by, for these options of adapter_config.json."""
    return math.sqrt(rank) if options.get("use_rslora") else rank


_method = functools.cache(functools.partial(build, "adapter"))


def _of(values_by_pattern, module, default):
    """The value of the first pattern that is a module's name or the end of it, as peft looks it up."""
    return next((value for key, value in values_by_pattern.items() if _ending(key).fullmatch(module)), default)


def _ending(key):
    return patterns.compile(rf"(.*\.)?({key})", f"{CONFIG}: rank_pattern or alpha_pattern")


def is_writable(spec: str) -> bool:
    """Whether the adapter `spec` can be written as a PEFT folder."""
    return lookup("adapter", parse_spec(spec)[0]).peft is not None


def read_spec(folder: PathLike) -> str:
    """Reads the `config.adapter` of a PEFT folder. Raises UserError for unsupported settings."""
    return read_config(folder).spec


def read_config(folder: PathLike) -> Config:
    """Reads the Config of a PEFT folder, or of a file of diffusers. Raises UserError for unsupported settings."""
    file = lora_file.find(pathlib.Path(folder))
    if file is not None:
        return _parse(lora_file.read_config(file), file)
    file = pathlib.Path(folder) / CONFIG
    return _parse(json_text.read(file), file)


def _parse(config, file):
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in PARTS:
        kinds = ", ".join(PARTS)
        raise UserError(f"{file}: peft_type = {short_repr(kind)}; only {kinds} can be read")
    for key, neutral in NEUTRAL.items():
        if config.get(key) and config[key] != neutral:  # empty values are defaults
            raise UserError(f"{file}: {key} = {short_repr(config[key])} is not supported; only {neutral!r} is")
    name = _name(kind, config, file)
    alpha_key = {"LORA": "lora_alpha", "GLORA": None}.get(kind, "alpha")
    where = file if kind == "LORA" else f"{file}: peft_type = {kind!r}"
    rank, alpha = _number(config, "r", where, int), _number(config, alpha_key, where) if alpha_key else 1.0
    ranks, alphas = _numbers(config, "rank_pattern", file, int), _numbers(config, "alpha_pattern", file)
    dropout = _number(config, "lora_dropout", file, default=0.0)
    adapter_config = Config(name, rank, alpha, dropout, ranks, alphas, kind, _saved(config, file))
    build("adapter", adapter_config.spec, where=f"{file}: the adapter")  # the method checks its parameters
    return adapter_config


def _saved(config, file):
    modules = config.get("modules_to_save") or []
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise UserError(f"{file}: modules_to_save = {short_repr(modules)} must be a list of names")
    return tuple(modules)


def _name(kind, config, file):
    """The method of this kind with the most options that the config sets."""
    methods = {name: lookup("adapter", name) for name in names("adapter")}
    options = {
        name: method.peft.options for name, method in methods.items() if method.peft and method.peft.kind == kind
    }
    name = max((name for name in options if _has(config, options[name])), key=lambda name: len(options[name]))
    for other in options.values():
        if other and other != options[name] and _has(config, other):
            shown_options = ", ".join(f"{key} = {value!r}" for key, value in other.items())
            raise UserError(f"{file}: {shown_options} together with {name} is not supported")
    initial, method_init = config.get("init_lora_weights", True), options[name].get("init_lora_weights")
    if initial not in (True, False, None, "gaussian", method_init, "eva", "orthogonal"):
        raise UserError(f"{file}: init_lora_weights = {initial!r} changes the base model in a way that is not known")
    return name


def _has(config, options):
    return all(config.get(key) == value for key, value in options.items())


def _number(config, key, file, kind=float, default=None):
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise UserError(f"{file}: {key} = {short_repr(value)} must be a number ({kind.__name__})")
    if not abs(value) <= MOST:
        raise UserError(f"{file}: {key} = {value!r} is too large: at most {MOST:g}")
    return value


def _numbers(config, key, file, kind=float):
    """Reads `{regex: number}`."""
    numbers = config.get(key) or {}
    if not isinstance(numbers, dict):
        raise UserError(f"{file}: {key} = {numbers!r} must be an object of patterns and numbers")
    for pattern in numbers:
        if _number(numbers, pattern, f"{file}: {key}", kind) <= 0:
            raise UserError(f"{file}: {key}: {pattern} = {numbers[pattern]} must be more than 0")
        patterns.compile(pattern, f"{file}: {key}")
    return numbers
