"""A config as plain data: nested for JSON, flat by dotted keys, hashed; keys newer than version 0.1 left out."""

import hashlib
import json
import math
import typing

from efficientllm.typing import Config


def flatten(tree: typing.Any, prefix: str = "") -> dict[str, typing.Any]:
    """`{"train.steps": 300, ...}` of a nested dict."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    pairs = (flatten(value, f"{prefix}.{key}".strip(".")) for key, value in tree.items())
    return {key: value for group in pairs for key, value in group.items()}


# Keys that version 0.1 had not, with their defaults, which do what it did: left out of what a run leaves where they
# have that value, so that its hash, its folder and its row are those of a run before them.
ADDED: dict[str, dict[str, typing.Any]] = {
    "": {"objective": "next_token()", "autoencoder": "pixels", "text_states": "", "compile_cache": True},
    "model": {"unroll": 12, "embed": "tokens", "modulation": "plain"},
    "train": {"ema": 0.0},
    "eval": {"also": ""},
    "sample": {"images": 16},
    "quality": {"fd": 0},
    "plan": {"images": ()},
    "profile": {"steps": ""},
    "metrics": {"price": 0.0, "carbon": ""},
    "infer": {
        **{"solver": "", "guidance": 1.0, "guidance_channels": 0},
        **{"negative_prompt": "", "size": (), "fps": 16.0, "offload": False, "max_pixels": 0},
    },
}
_NEW = ("profile",)  # groups all of whose keys are new
_PLAIN_ADDED = json.loads(json.dumps(ADDED))


def plain(config: Config) -> dict[str, typing.Any]:
    """The config as JSON holds it: dicts, lists, strings, numbers; a number that is not finite is a string.

    Keys of `ADDED` are left out at their defaults.
    """
    tree = _finite(json.loads(json.dumps(config.to_dict())))
    for group, added in _PLAIN_ADDED.items():
        values = tree if group == "" else tree.get(group, {})
        for key in [key for key, default in added.items() if key in values and values[key] == default]:
            del values[key]
        if group and group in tree and not values:  # all of its keys are new
            del tree[group]
    return tree


def with_added_keys(tree: dict[str, typing.Any]) -> dict[str, typing.Any]:
    """`plain(config)` with the keys of `ADDED` at their defaults where they are left out."""
    groups = {group: added | tree.get(group, {}) for group, added in _PLAIN_ADDED.items() if group in (*tree, *_NEW)}
    return _PLAIN_ADDED[""] | tree | groups


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def config_hash(config: Config) -> str:
    """Twelve hex digits that name the config's content."""
    return hashlib.sha256(json.dumps(plain(config), sort_keys=True).encode()).hexdigest()[:12]
