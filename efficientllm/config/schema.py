"""Config schema: the keys of the base config and no others, their types, and the allowed values of each.

Checked before JAX is imported: names and fields of techniques come from `registry.catalogue`. Values that depend on a
model, on data or on devices are checked where those are built.
"""

import typing

from ml_collections import ConfigDict, FrozenConfigDict

from efficientllm import base_config
from efficientllm.config import key_ranges, profiled_steps, value_rules
from efficientllm.config.plain import flatten
from efficientllm.errors import UserError, did_you_mean, one_line, short_repr
from efficientllm.registry import ranges
from efficientllm.typing import Config

# Names of other programs for what is a key, or part of a key, here.
ELSEWHERE = {
    **dict.fromkeys(
        ("lr", "learning_rate", "peak", "warmup", "warmup_steps", "min_lr"),
        "the learning rate is the peak of config.train.schedule: 'cosine(peak=0.003, warmup=0.1, final=0.1)'",
    ),
    **dict.fromkeys(("weight_decay", "wd"), "it is config.train.decay: (('kernel$', 0.1), ('.*', 0.0))"),
    **dict.fromkeys(("beta1", "beta2", "b1", "b2", "momentum"), "it is a field of config.train.optimizer"),
    **dict.fromkeys(("epochs", "num_epochs", "max_steps"), "config.train.steps is the length of a run"),
    **dict.fromkeys(("seq_len", "seq_length", "max_length", "context_length"), "it is config.train.length"),
    **dict.fromkeys(("grad_clip", "max_grad_norm"), "it is config.train.clip"),
    "steps": "did you mean 'train.steps'?",
    "gradient_accumulation_steps": "it is config.train.accumulate, micro-batches a step",
    **dict.fromkeys(
        ("num_layers", "layers", "dim", "num_heads", "heads", "hidden", "hidden_size"),
        "it is a field of config.model.size: 'tiny(num_layers=8)'",
    ),
    **dict.fromkeys(("rank", "alpha", "lora", "dropout", "target"), "it is a field of config.adapter: 'lora(rank=8)'"),
    **dict.fromkeys(("dtype", "bf16", "fp16"), "it is config.model.precision"),
    **dict.fromkeys(("top_k", "top_p", "min_p"), "it is a field of config.infer.sampler: 'sample(top_p=0.9)'"),
    **dict.fromkeys(("device", "gpus", "num_gpus"), "devices are those of config.mesh"),
}
TYPE_NAMES = {bool: "True or False", str: "text", tuple: "a tuple"}


def validate_config(config: Config, where: str = "config") -> Config:
    """Returns a locked copy of `config` with all keys of the base config, each of its type and in its range.

    Raises UserError, whose messages about keys and types begin with `where`.
    """
    conformed = conform_config(config, where)
    check_values(conformed)
    return conformed.lock()


def conform_config(config: Config, where: str = "config") -> ConfigDict:
    """Returns a copy of `config` with exactly the keys and types of the base config. Raises UserError for others."""
    if not isinstance(config, ConfigDict | FrozenConfigDict):
        raise UserError(
            f"{where}: get_config() must return the ConfigDict of efficientllm.base_config.get_config(), changed; "
            f"it returns {'nothing' if config is None else f'a {type(config).__name__}'}"
        )
    conformed = base_config.get_config()
    try:
        tree = config.to_dict()
    except Exception as error:  # a placeholder without a value, a reference that fails, a config in itself
        raise UserError(f"{where}: the config cannot be read ({one_line(error)})") from None
    _fill(conformed, tree, "config", where)
    return conformed


def _fill(group, tree, path, where):
    """Sets the keys of `group`, a group of the base config, to their values in `tree`."""
    for key in tree:
        if key not in group:
            raise UserError(f"{where}: {unknown_key(f'{path}.{key}')}")
    for key, default in group.items():
        if key not in tree:
            raise UserError(f"{where}: {path}.{key} is missing; start from efficientllm.base_config.get_config()")
        if isinstance(default, ConfigDict):
            if not isinstance(tree[key], dict):
                raise UserError(f"{where}: {path}.{key} = {short_repr(tree[key])}: is a group of keys, not a value")
            _fill(default, tree[key], f"{path}.{key}", where)
        else:
            group[key] = convert_type(f"{path}.{key}", tree[key], default)


def unknown_key(path: str) -> str:
    """The message about a key that the config does not have, such as `config.train.stps`."""
    *parents, key = str(path).split(".")[1:]
    group = base_config.get_config()
    for parent in parents:
        if parent not in group or not isinstance(group[parent], ConfigDict):
            key = parent
            break
        group = group[parent]
    says = f"the config has no key {key!r}" if key not in group else f"config key {key!r} has no keys"
    if key in ELSEWHERE:
        return f"{path}: {says}; {ELSEWHERE[key]}"
    if hint := did_you_mean(key, group):
        return f"{path}: {says}{hint}"
    elsewhere = [full for full in default_values() if full.rpartition(".")[2] == key]
    hint = f"; did you mean {elsewhere[0]!r}?" if elsewhere else f"; known: {', '.join(group)}"
    return f"{path}: {says}{hint}"


def default_values() -> dict[str, typing.Any]:
    """Every key of the base config with its default: `{"train.steps": 200}`."""
    return flatten(base_config.get_config().to_dict())


def convert_type(where: str, value: typing.Any, default: typing.Any) -> typing.Any:
    """`value`, as a float where `default` is one. Raises UserError for a value of another type."""
    key_type = type(default)
    if key_type is float and type(value) is int:
        ranges.check_range(where, value, ranges.FINITE)
        return float(value)
    if type(value) is not key_type:
        allowed = key_ranges.KEYS.get(where.removeprefix("config.")) or TYPE_NAMES[key_type]
        raise UserError(f"{where} = {short_repr(value)}: must be {allowed}, not {_describe_type(value)}")
    return value


def _describe_type(value):
    if value is None or isinstance(value, bool):
        return str(value)
    name, module = type(value).__name__, type(value).__module__
    name = f"an {name}" if name[0] in "aeiou" else f"a {name}"
    return name if module == "builtins" else f"{name} of {module}"


def check_values(config: Config) -> None:
    """Raises UserError for the first value out of its range, unknown technique, or conflict of two values."""
    has_plugins = bool(config.imports)  # they may register names that are not known yet
    defaults = default_values()
    for key, value in flatten(config.to_dict()).items():
        if value == defaults[key]:  # allowed: the sources of its techniques need not be parsed for it
            continue
        where = f"config.{key}"
        if key in key_ranges.KEYS:
            ranges.check_range(where, value, key_ranges.KEYS[key])
        value_rules.check_value(key, value, where, has_plugins)
    _check_together(config)


def _check_together(config):
    train = config.train
    if train.batch_size % train.accumulate:
        raise UserError(
            f"config.train.accumulate = {train.accumulate}: must divide config.train.batch_size = {train.batch_size}"
        )
    profiled_steps.check_with_task(config)
    if config.task == "infer" and not config.infer.prompts:
        raise UserError("config.infer.prompts = (): needs a text; give one, or a file of them")
    if config.task in ("pretrain", "tune") and config.sample.tokens and not config.sample.prompt:
        raise UserError(
            "config.sample.prompt = '': a sample continues a prompt; give one, or set config.sample.tokens = 0"
        )
