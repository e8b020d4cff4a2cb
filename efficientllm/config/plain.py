"""Plain-data forms of a config: nested as JSON holds it, flat by dotted keys, and its hash."""

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
ADDED = {"model": {"unroll": 12}}


def plain(config: Config) -> dict[str, typing.Any]:
    """The config as JSON holds it: dicts, lists, strings, numbers; a number that is not finite is a string.

    Keys of `ADDED` are left out at their defaults.
    """
    tree = _finite(json.loads(json.dumps(config.to_dict())))
    for group, added in ADDED.items():
        if group in tree:
            tree[group] = {key: value for key, value in tree[group].items() if (key, value) not in added.items()}
    return tree


def with_added_keys(tree: dict[str, typing.Any]) -> dict[str, typing.Any]:
    """`plain(config)` with the keys of `ADDED` at their defaults where they are left out."""
    return tree | {group: added | tree[group] for group, added in ADDED.items() if group in tree}


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def config_hash(config: Config) -> str:
    """Twelve hex digits that name the config's content."""
    return hashlib.sha256(json.dumps(plain(config), sort_keys=True).encode()).hexdigest()[:12]
