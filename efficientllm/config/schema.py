"""The schema of a config: the keys of the base config and no others, their types, and what each value may be.

Everything here is answered before jax is imported; names and fields of techniques come from the `catalogue`. What
depends on a model, on data or on devices is checked by those who build them.
"""

from ml_collections import ConfigDict, FrozenConfigDict

from efficientllm import base_config
from efficientllm.config import values
from efficientllm.config.plain import flatten
from efficientllm.errors import UserError, did_you_mean, one_line, shown
from efficientllm.registry import ranges

# Where people look for what is part of another key.
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
KINDS = {bool: "True or False", str: "text", tuple: "a tuple"}


def checked(config, where="config"):
    """A locked copy of `config` with all keys of the base config, each of its type and in its range.

    `where` comes before what is wrong with keys and types. Raises UserError.
    """
    complete = closed(config, where)
    check(complete)
    return complete.lock()


def closed(config, where="config"):
    """A copy of `config` that has the keys and types of the base config. Raises UserError for any others."""
    if not isinstance(config, ConfigDict | FrozenConfigDict):
        raise UserError(
            f"{where}: get_config() must return the ConfigDict of efficientllm.base_config.get_config(), changed; "
            f"it returns {'nothing' if config is None else f'a {type(config).__name__}'}"
        )
    complete = base_config.get_config()
    try:
        tree = config.to_dict()
    except Exception as error:  # a placeholder without a value, a reference that fails, a config in itself
        raise UserError(f"{where}: the config cannot be read ({one_line(error)})") from None
    _fill(complete, tree, "config", where)
    return complete


def _fill(complete, tree, path, where):
    """Sets the keys of `complete`, a group of the base config, to what `tree` has for them."""
    for key in tree:
        if key not in complete:
            raise UserError(f"{where}: {unknown(f'{path}.{key}')}")
    for key, default in complete.items():
        if key not in tree:
            raise UserError(f"{where}: {path}.{key} is missing; start from efficientllm.base_config.get_config()")
        if isinstance(default, ConfigDict):
            if not isinstance(tree[key], dict):
                raise UserError(f"{where}: {path}.{key} = {shown(tree[key])}: is a group of keys, no value")
            _fill(default, tree[key], f"{path}.{key}", where)
        else:
            complete[key] = typed(f"{path}.{key}", tree[key], default)


def unknown(path):
    """What to say of a key that the config has not: `config.train.stps`."""
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
    elsewhere = [full for full in keys() if full.rpartition(".")[2] == key]
    hint = f"; did you mean {elsewhere[0]!r}?" if elsewhere else f"; known: {', '.join(group)}"
    return f"{path}: {says}{hint}"


def keys():
    """Every key of the base config with its default: `{"train.steps": 200}`."""
    return flatten(base_config.get_config().to_dict())


def typed(where, value, default):
    """`value`, a float where `default` is one. Raises UserError for a value of another type."""
    wanted = type(default)
    if wanted is float and type(value) is int:
        ranges.check_range(where, value, ranges.FINITE)
        return float(value)
    if type(value) is not wanted:
        allowed = ranges.KEYS.get(where.removeprefix("config.")) or KINDS[wanted]
        raise UserError(f"{where} = {shown(value)}: must be {allowed}, not {_described(value)}")
    return value


def _described(value):
    if value is None or isinstance(value, bool):
        return str(value)
    name, module = type(value).__name__, type(value).__module__
    name = f"an {name}" if name[0] in "aeiou" else f"a {name}"
    return name if module == "builtins" else f"{name} of {module}"


def check(config):
    """Raises UserError for the first value that is out of its range, names no technique, or does not go with others."""
    own = bool(config.imports)  # which may register names that are not known yet
    for key, value in flatten(config.to_dict()).items():
        where = f"config.{key}"
        if key in ranges.KEYS:
            ranges.check_range(where, value, ranges.KEYS[key])
        values.check(key, value, where, own)
    _check_together(config)


def _check_together(config):
    train = config.train
    if train.batch_size % train.accumulate:
        raise UserError(
            f"config.train.accumulate = {train.accumulate}: must divide config.train.batch_size = {train.batch_size}"
        )
    if config.task == "infer" and not config.infer.prompts:
        raise UserError("config.infer.prompts = (): give one text at least, or a file of them")
    if config.task in ("pretrain", "tune") and config.sample.tokens and not config.sample.prompt:
        raise UserError(
            "config.sample.prompt = '': a sample goes on from some text; give one, or set config.sample.tokens = 0"
        )
