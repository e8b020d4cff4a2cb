"""What a checkpoint was trained on, and by which schedule: kept in it, and compared when a run goes on."""

import hashlib
import pathlib

from efficientllm.errors import UserError
from efficientllm.optim import rules

# What the content of each is called where it has changed.
_NAMES = {"data": "config.data", "tokenizer": "config.tokenizer", "pretrained": "config.model.pretrained"}
_WEIGHTS = ("*.safetensors", "config.json", "checkpoints/*/checksums.json")  # the last of a run's folder
_SAMPLES, _PIECE = 64, 1 << 14


def of(run):
    """The facts of a `train.setup.Setup`: fingerprints of what was read, and which steps each schedule was for."""
    train = run.config.train
    return {"fingerprints": fingerprints(run), "schedules": [{"from_step": 0, "steps": train.steps}]}


def fingerprints(run):
    """`{"data", "tokenizer", "pretrained"}`: what names the content, None where that is not known."""
    sampled = run.data.get("sampled")  # of a stream only what was read ahead
    return {
        "data": None if sampled else run.data.get("fingerprint"),
        "tokenizer": getattr(run.tokenizer, "fingerprint", None),
        "pretrained": None if run.source is None else of_weights(run.source.path),
    }


def of_weights(path):
    """Sixteen hex digits of a checkpoint's files: their names, sizes, and `_SAMPLES` pieces of each, spread over it."""
    path, found = pathlib.Path(path), hashlib.sha256()
    for file in sorted(each for kind in _WEIGHTS for each in path.glob(kind)) if path.is_dir() else [path]:
        size = file.stat().st_size
        found.update(f"{file.name} {size} ".encode())
        with open(file, "rb") as opened:
            for index in range(_SAMPLES):
                opened.seek(index * max(0, size - _PIECE) // (_SAMPLES - 1))
                found.update(opened.read(_PIECE))
    return found.hexdigest()[:16]


def check(before, now, config):
    """Refuses to go on from a checkpoint of other content. Raises UserError."""
    old, new = before.get("fingerprints") or {}, now["fingerprints"]
    for key, name in _NAMES.items():
        if None not in (old.get(key), new.get(key)) and old[key] != new[key]:
            value = config.model.pretrained if key == "pretrained" else config[key]
            raise UserError(
                f"{name} = {value!r}: its content is not what the run in this workdir was trained on; restore it, or "
                "take another workdir or --overwrite"
            )


def joined(before, now, step, config):
    """The facts of a run that goes on from `step`: the schedules of its parts, where their rates differ."""
    steps, schedules = config.train.steps, before.get("schedules") or []
    if not schedules or _alike(config.train, schedules[-1]["steps"], step):
        return now | {"schedules": [*schedules[:-1], {**(schedules or [{"from_step": 0}])[-1], "steps": steps}]}
    return now | {"schedules": [*schedules, {"from_step": step, "steps": steps}]}


def _alike(train, steps, step):
    """Whether the schedule for `steps` gave the rates up to `step` that the one for `train.steps` gives."""
    before = train.copy_and_resolve_references()
    before.steps = steps
    old, new = rules.schedule(before), rules.schedule(train)
    looked_at = {*(step * part // 16 for part in range(16)), step - 1}
    return all(float(old(at)) == float(new(at)) for at in looked_at)


def line(schedules):
    """`the learning rate is that of 200 steps up to step 100, of 400 from there on`, or None of one schedule."""
    if len(schedules) < 2:
        return None
    ends = [part["from_step"] for part in schedules[1:]]
    parts = [f"of {part['steps']} steps up to step {end}" for part, end in zip(schedules, ends, strict=False)]
    return f"the learning rate is that {', '.join(parts)}, of {schedules[-1]['steps']} steps from there on"
