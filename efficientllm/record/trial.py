"""A run's name in a list of runs, and the keys of its config that such a list shows."""

import hashlib
import json

from efficientllm.config.differences import differences

# How a run is watched, saved or called; infer's keys, where nothing is served.
_UNTOLD = ("name", "imports", "checkpoint", "eval.every", "sample", "metrics", "plan", "sweep", "train.log_every")
_SERVING = ("infer", "quality")
_LONGEST = 80  # characters of the differences in a name


def told(config):
    """The keys of a flat config that say what is compared."""
    hidden = _UNTOLD if config.get("task") == "infer" else _UNTOLD + _SERVING
    return {key: value for key, value in config.items() if not any(f"{key}.".startswith(f"{h}.") for h in hidden)}


def name(config):
    """`seed 1, moe, ffn=moe(num_experts=8) #3f2a`: readable, and another one for every config.

    The seed comes first: TensorBoard's table cuts names behind 14 letters, and its columns hold the rest.
    """
    keys = [key for key in differences(told(config)) if key not in ("seed", "task")]
    keys.sort(key=lambda key: (not key.startswith(("model.", "adapter", "quant")), key))
    text = ", ".join(f"{key.rpartition('.')[2]}={config[key]}" for key in keys)
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    known = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:4]
    return (
        ", ".join(filter(None, (f"seed {config.get('seed')}", str(config.get("name") or "run"), text))) + f" #{known}"
    )
