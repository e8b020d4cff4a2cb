"""Fingerprints of a run's inputs, and its learning-rate schedules: stored in checkpoints, compared on resume."""

import hashlib
import pathlib
from collections.abc import Sequence

from efficientllm.errors import UserError
from efficientllm.optim import from_config
from efficientllm.train.setup import Setup
from efficientllm.typing import Config, PathLike, Record

# The config key that a message names where the content has changed.
_NAMES = {"data": "config.data", "tokenizer": "config.tokenizer", "pretrained": "config.model.pretrained"}
_WEIGHTS = (
    "*.safetensors",
    "config.json",
    "checkpoints/*/checksums.json",
)  # checksums.json: in folders of our own runs
_SAMPLES, _PIECE = 64, 1 << 14


def of(setup: Setup) -> Record:
    """The facts of a new run (a `train.setup.Setup`): its fingerprints, and the number of steps of its schedule."""
    train = setup.config.train
    return {"fingerprints": fingerprints(setup), "schedules": [{"from_step": 0, "steps": train.steps}]}


def fingerprints(setup: Setup) -> dict[str, str | None]:
    """`{"data", "tokenizer", "pretrained"}`: a fingerprint of each content, None where unknown."""
    sampled = setup.data.get("sampled")  # a stream: only its first documents have been read
    return {
        "data": None if sampled else setup.data.get("fingerprint"),
        "tokenizer": setup.dataset.tokenizer_fingerprint,
        "pretrained": None if setup.source is None else of_weights(setup.source.path),
    }


def of_weights(path: PathLike) -> str:
    """Hashes a checkpoint to 16 hex digits: name, size and `_SAMPLES` evenly spaced pieces of each file."""
    path, digest = pathlib.Path(path), hashlib.sha256()
    files = sorted(file for pattern in _WEIGHTS for file in path.glob(pattern)) if path.is_dir() else [path]
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with open(file, "rb") as opened:
            for index in range(_SAMPLES):
                opened.seek(index * max(0, size - _PIECE) // (_SAMPLES - 1))
                digest.update(opened.read(_PIECE))
    return digest.hexdigest()[:16]


def check(before: Record, now: Record, config: Config) -> None:
    """Raises UserError where the checkpoint to resume from was trained on other data, tokenizer or base weights."""
    old, new = before.get("fingerprints") or {}, now["fingerprints"]
    for key, name in _NAMES.items():
        if None not in (old.get(key), new.get(key)) and old[key] != new[key]:
            value = config.model.pretrained if key == "pretrained" else config[key]
            raise UserError(
                f"{name} = {value!r}: its content is not what the run in this workdir was trained on; restore it, or "
                "take another workdir or --overwrite"
            )


def joined(before: Record, now: Record, step: int, config: Config) -> Record:
    """The facts of a run resumed at `step`: a schedule is appended if it changes the learning rate of earlier steps."""
    steps, schedules = config.train.steps, before.get("schedules") or []
    if not schedules or _same_rates(config.train, schedules[-1]["steps"], step):
        return now | {"schedules": [*schedules[:-1], {**(schedules or [{"from_step": 0}])[-1], "steps": steps}]}
    return now | {"schedules": [*schedules, {"from_step": step, "steps": steps}]}


def _same_rates(train, steps, step):
    """Whether the schedules for `steps` and for `train.steps` have equal rates before `step`, at 17 sampled steps."""
    before = train.copy_and_resolve_references()
    before.steps = steps
    old, new = from_config.schedule(before), from_config.schedule(train)
    sampled_steps = {*(step * index // 16 for index in range(16)), step - 1}
    return all(float(old(at)) == float(new(at)) for at in sampled_steps)


def line(schedules: Sequence[Record]) -> str | None:
    """`the learning rate is that of 200 steps up to step 100, of 400 from there on`, or None for a single schedule."""
    if len(schedules) < 2:
        return None
    ends = [schedule["from_step"] for schedule in schedules[1:]]
    spans = [f"of {schedule['steps']} steps up to step {end}" for schedule, end in zip(schedules, ends, strict=False)]
    return f"the learning rate is that {', '.join(spans)}, of {schedules[-1]['steps']} steps from there on"
