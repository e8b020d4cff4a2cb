"""Name of a run in TensorBoard's table of runs, made of the config keys that tell runs apart."""

import hashlib
import json
import typing

from efficientllm.config.differences import differences

# Keys of how a run is logged, saved or named; and the keys of inference, for other tasks.
_HIDDEN = ("name", "imports", "checkpoint", "eval.every", "sample", "metrics", "plan", "sweep", "train.log_every")
_SERVING = ("infer", "quality")
_LONGEST = 80  # characters of the differences in a name


def compared_keys(config: dict[str, typing.Any]) -> dict[str, typing.Any]:
    """The keys of a flat config that tell compared runs apart."""
    hidden = _HIDDEN if config.get("task") == "infer" else _HIDDEN + _SERVING
    return {
        key: value for key, value in config.items() if not any(f"{key}.".startswith(f"{prefix}.") for prefix in hidden)
    }


def name(config: dict[str, typing.Any]) -> str:
    """`seed 1, moe, ffn=moe(num_experts=8) #3f2a`: readable, and different for every config.

    The seed comes first: TensorBoard's table cuts names behind 14 letters, and its columns hold the rest.
    """
    keys = [key for key in differences(compared_keys(config)) if key not in ("seed", "task")]
    keys.sort(key=lambda key: (not key.startswith(("model.", "adapter", "quant")), key))
    text = ", ".join(f"{key.rpartition('.')[2]}={config[key]}" for key in keys)
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:4]
    return (
        ", ".join(filter(None, (f"seed {config.get('seed')}", str(config.get("name") or "run"), text))) + f" #{digest}"
    )
