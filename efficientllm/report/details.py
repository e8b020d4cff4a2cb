"""What the page shows of a run when its row is opened: command, config, numbers with sources, log, sample, files."""

import os
import urllib.parse

from efficientllm.config.differences import differences
from efficientllm.errors import UserError
from efficientllm.record import notes
from efficientllm.report import command, comparison, texts
from efficientllm.untrusted import files, json_text

_FILES = ("record.json", "config.json", "log.txt", "output.txt", "samples/generated.jsonl")
_SAMPLE = "sample: "  # the log's line of a training run
_LONGEST = 2000  # characters of a sample or of one value of a config


def details(rows, folder):
    """`{path: details}` of rows, with links relative to the report's `folder`, and the texts that they share once."""
    shared = {}
    return {"runs": {str(row.path): _details(row, folder, shared) for row in rows}, "texts": list(shared)}


def _details(row, folder, shared):
    seen, beside = row.record["provenance"], row.path.parent
    return {
        "variant": row.variant,
        "outcome": row.outcome,
        "block": row.block,
        "facts": _facts(row, seen),
        "command": command.command(row),
        "config": [
            [key, _shown(row.config[key]), None if known is None else _shown(known)]
            for key, known in differences(row.config).items()
        ],
        "keys": len(row.config),
        "numbers": {
            key: [value, shared.setdefault(_source(row, key), len(shared))] for key, value in row.values.items()
        },
        "notes": notes.notes(row.record),
        "log": "" if row.ok else row.tail(),
        "sample": _sample(row),
        "files": {name: _link(beside / name, folder) for name in _FILES if files.is_file(beside / name)},
    }


def _facts(row, seen):
    git, versions = seen.get("git") or {}, seen.get("versions") or {}
    commit = git.get("commit")
    facts = {
        "task": row.task,
        "device": comparison.device(row),
        "started": seen.get("started"),
        "ended": seen.get("ended"),
        "commit": commit and f"{commit[:12]}{', with changes that are not committed' if git.get('dirty') else ''}",
        "versions": ", ".join(f"{name} {versions[name]}" for name in ("python", "jax", "flax") if versions.get(name)),
    }
    return {name: str(value) for name, value in facts.items() if value}


def _source(row, key):
    """Where a number comes from, or why there is none."""
    return (row.reasons.get(key) if row.values[key] is None else row.source(key)) or ""


def _shown(value):
    text = command.literal(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _sample(row):
    """What a run generated: the first answers of inference, the sample in the log of training, or nothing."""
    answers, log = row.path.parent / "samples" / "generated.jsonl", row.path.parent / "log.txt"
    if files.is_file(answers):
        try:
            found = [json_text.parse(line, answers) for line in texts.beginning(answers).splitlines()[:3]]
            return "\n\n".join(f"{each['prompt']}\n→ {each['answer']}" for each in found)[:_LONGEST]
        except (UserError, KeyError):
            return ""  # a sample is no part of a row; a damaged one takes nothing away
    lines = texts.end(log).splitlines()
    return next((line[len(_SAMPLE) :][:_LONGEST] for line in reversed(lines) if line.startswith(_SAMPLE)), "")


def _link(file, folder):
    return urllib.parse.quote(os.path.relpath(file, folder).replace(os.sep, "/"))
