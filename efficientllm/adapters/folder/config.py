"""What an adapter_config.json says, in the words of our methods."""

import dataclasses
import math
import pathlib

from efficientllm.errors import UserError
from efficientllm.registry import build, parse
from efficientllm.untrusted import json_text, patterns

CONFIG = "adapter_config.json"
MOST = 1e6  # of a rank, an alpha or a factor
# Keys that change what is computed, and the only value of each that we compute.
NEUTRAL = {
    "bias": "none", "fan_in_fan_out": False, "lora_bias": False, "modules_to_save": None, "layer_replication": None,
    "trainable_token_indices": None, "target_parameters": None, "use_qalora": False, "use_bdlora": None,
    "arrow_config": None, "alora_invocation_tokens": None, "kasa_config": None,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """A folder's adapters.

    Args:
      name: of our method: lora, rslora, dora or pissa.
      rank, alpha, dropout: the method's.
      ranks, alphas: those of modules that differ, by a regex of the end of their names.
    """

    name: str
    rank: int
    alpha: float
    dropout: float
    ranks: dict
    alphas: dict

    @property
    def spec(self):
        """The `config.adapter` of modules that are as most."""
        return f"{self.name}(rank={self.rank}, alpha={self.alpha}, dropout={self.dropout})"

    def rank_of(self, module):
        """The rank of a module's adapter."""
        return _of(self.ranks, module, self.rank)

    def scale_of(self, module):
        """What A B is multiplied with."""
        rank = self.rank_of(module)
        return _of(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.name == "rslora" else rank)


def _of(found, module, default):
    """The value of the first pattern that is a module's name or the end of it, as peft looks it up."""
    return next((value for key, value in found.items() if _ending(key).fullmatch(module)), default)


def _ending(key):
    return patterns.compile(rf"(.*\.)?({key})", f"{CONFIG}: rank_pattern or alpha_pattern")


def is_writable(spec):
    """Whether peft has a folder for the adapter `spec`."""
    return parse(spec)[0] in ("lora", "rslora", "dora", "pissa", "lora_plus")


def read_spec(folder):
    """The `config.adapter` of a folder of peft's. Raises UserError for what we do not compute."""
    return read_config(folder).spec


def read_config(folder):
    """The Config of a folder of peft's. Raises UserError for what we do not compute."""
    file = pathlib.Path(folder) / CONFIG
    config = json_text.read(file)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type = {config.get('peft_type')!r}; only LORA can be read")
    for key, neutral in NEUTRAL.items():
        if config.get(key) not in (neutral, None, False) and config.get(key) != neutral:
            raise UserError(f"{file}: {key} = {config[key]!r} is not supported; only {neutral!r} is")
    name = _name(config, file)
    rank, alpha = _number(config, "r", file, int), _number(config, "lora_alpha", file)
    ranks, alphas = _numbers(config, "rank_pattern", file, int), _numbers(config, "alpha_pattern", file)
    found = Config(name, rank, alpha, _number(config, "lora_dropout", file, default=0.0), ranks, alphas)
    build("adapter", found.spec, where=f"{file}: the adapter")  # its own check of the numbers
    return found


def _name(config, file):
    initial = config.get("init_lora_weights", True)
    if config.get("use_dora"):
        name = "dora"
    elif initial == "pissa":
        name = "pissa"
    else:
        name = "rslora" if config.get("use_rslora") else "lora"
    if config.get("use_rslora") and name != "rslora":
        raise UserError(f"{file}: use_rslora together with {name} is not supported")
    if initial == "pissa" and name != "pissa":
        raise UserError(f"{file}: init_lora_weights = 'pissa' together with {name} is not supported")
    if initial not in (True, False, "gaussian", "pissa"):
        raise UserError(f"{file}: init_lora_weights = {initial!r} changes the base model in a way that is not known")
    return name


def _number(config, key, file, kind=float, default=None):
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise UserError(f"{file}: {key} = {json_text.shown(value)} must be a number ({kind.__name__})")
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
