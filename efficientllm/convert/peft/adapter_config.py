"""What an adapter_config.json says, in the words of our methods."""

import dataclasses
import functools
import math
import pathlib

from efficientllm.convert.peft.adapter_kinds import PARTS
from efficientllm.errors import UserError, shown
from efficientllm.registry import build, lookup, names, parse_spec, spec_parameters
from efficientllm.untrusted import json_text, patterns

CONFIG = "adapter_config.json"
MOST = 1e6  # of a rank, an alpha or a factor
# Keys that change what is computed, and the only value of each that we compute.
NEUTRAL = {
    "bias": "none", "fan_in_fan_out": False, "lora_bias": False, "layer_replication": None,
    "trainable_token_indices": None, "target_parameters": None, "use_qalora": False, "use_bdlora": None,
    "arrow_config": None, "alora_invocation_tokens": None, "kasa_config": None,
    "monteclora_config": None, "ensure_weight_tying": False,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """A folder's adapters.

    Args:
      name: of our method, as it is registered.
      rank, alpha, dropout: the method's.
      ranks, alphas: those of modules that differ, by a regex of the end of their names.
      kind: peft's name of them (`kinds.PARTS`).
      saved: ends of the names of modules that are trained and saved whole.
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
    def spec(self):
        """The `config.adapter` of modules that are as most."""
        return self._spec(self.rank, self.alpha)

    def _spec(self, rank, alpha):
        fields = spec_parameters(lookup("adapter", self.name))
        values = {"rank": rank, "alpha": alpha, "dropout": self.dropout}
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in values.items() if key in fields)})"

    def method_of(self, module=None):
        """The method of a module's adapter; without a module, of one that is as most."""
        alpha = self.alpha if module is None else _of(self.alphas, module, self.alpha)
        return _method(self._spec(self.rank if module is None else self.rank_of(module), alpha))

    def rank_of(self, module):
        """The rank of a module's adapter."""
        return _of(self.ranks, module, self.rank)

    def scale_of(self, module):
        """What A B is multiplied with."""
        if self.kind == "GLORA":
            return 1.0
        options = lookup("adapter", self.name).peft.options
        return _of(self.alphas, module, self.alpha) / scale_divisor(options, self.rank_of(module))


def scale_divisor(options, rank):
    """What PEFT divides alpha by, for these options of adapter_config.json."""
    return math.sqrt(rank) if options.get("use_rslora") else rank


_method = functools.cache(functools.partial(build, "adapter"))


def _of(found, module, default):
    """The value of the first pattern that is a module's name or the end of it, as peft looks it up."""
    return next((value for key, value in found.items() if _ending(key).fullmatch(module)), default)


def _ending(key):
    return patterns.compile(rf"(.*\.)?({key})", f"{CONFIG}: rank_pattern or alpha_pattern")


def is_writable(spec):
    """Whether peft has a folder for the adapter `spec`."""
    return lookup("adapter", parse_spec(spec)[0]).peft is not None


def read_spec(folder):
    """The `config.adapter` of a folder of peft's. Raises UserError for what we do not compute."""
    return read_config(folder).spec


def read_config(folder):
    """The Config of a folder of peft's. Raises UserError for what we do not compute."""
    file = pathlib.Path(folder) / CONFIG
    config = json_text.read(file)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in PARTS:
        known = ", ".join(PARTS)
        raise UserError(f"{file}: peft_type = {shown(kind)}; only {known} can be read")
    for key, neutral in NEUTRAL.items():
        if config.get(key) and config[key] != neutral:  # what is empty says nothing
            raise UserError(f"{file}: {key} = {shown(config[key])} is not supported; only {neutral!r} is")
    name = _name(kind, config, file)
    alpha = {"LORA": "lora_alpha", "GLORA": None}.get(kind, "alpha")
    where = file if kind == "LORA" else f"{file}: peft_type = {kind!r}"
    rank, alpha = _number(config, "r", where, int), _number(config, alpha, where) if alpha else 1.0
    ranks, alphas = _numbers(config, "rank_pattern", file, int), _numbers(config, "alpha_pattern", file)
    dropout = _number(config, "lora_dropout", file, default=0.0)
    found = Config(name, rank, alpha, dropout, ranks, alphas, kind, _saved(config, file))
    build("adapter", found.spec, where=f"{file}: the adapter")  # its own check of the numbers
    return found


def _saved(config, file):
    found = config.get("modules_to_save") or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise UserError(f"{file}: modules_to_save = {shown(found)} must be a list of names")
    return tuple(found)


def _name(kind, config, file):
    """The method of the kind whose options the config has, the most of them."""
    methods = {name: lookup("adapter", name) for name in names("adapter")}
    options = {
        name: method.peft.options for name, method in methods.items() if method.peft and method.peft.kind == kind
    }
    name = max((name for name in options if _has(config, options[name])), key=lambda name: len(options[name]))
    for other in options.values():
        if other and other != options[name] and _has(config, other):
            shown_options = ", ".join(f"{key} = {value!r}" for key, value in other.items())
            raise UserError(f"{file}: {shown_options} together with {name} is not supported")
    initial, ours = config.get("init_lora_weights", True), options[name].get("init_lora_weights")
    if initial not in (True, False, None, "gaussian", ours, "eva", "orthogonal"):
        raise UserError(f"{file}: init_lora_weights = {initial!r} changes the base model in a way that is not known")
    return name


def _has(config, options):
    return all(config.get(key) == value for key, value in options.items())


def _number(config, key, file, kind=float, default=None):
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise UserError(f"{file}: {key} = {shown(value)} must be a number ({kind.__name__})")
    if not abs(value) <= MOST:
        raise UserError(f"{file}: {key} = {value!r} is too large: at most {MOST:g}")
    return value


def _numbers(config, key, file, kind=float):
    """A dict of patterns, each of them a regex, and numbers."""
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise UserError(f"{file}: {key} = {found!r} must be an object of patterns and numbers")
    for pattern in found:
        if _number(found, pattern, f"{file}: {key}", kind) <= 0:
            raise UserError(f"{file}: {key}: {pattern} = {found[pattern]} must be more than 0")
        patterns.compile(pattern, f"{file}: {key}")
    return found
