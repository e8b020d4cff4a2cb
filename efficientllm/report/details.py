"""Details of a run on the page: command, config, numbers with sources, log, sample, files."""

import os
import pathlib
import typing
import urllib.parse
from collections.abc import Sequence

from efficientllm.config.differences import differences
from efficientllm.errors import UserError
from efficientllm.record import timing_notes
from efficientllm.report import file_excerpts, groups, rerun_command
from efficientllm.report.rows import Row
from efficientllm.untrusted import files, json_text

_FILES = ("record.json", "config.json", "log.txt", "output.txt", "samples/generated.jsonl", "samples/grid.png")
_SAMPLE = "sample: "  # the log's line of a training run
_LONGEST = 2000  # characters of a sample or of one value of a config


def run_details(rows: Sequence[Row], folder: pathlib.Path) -> dict[str, typing.Any]:
    """`{path: details}` of rows, with links relative to the report's `folder`; shared texts are stored once."""
    shared: dict[str, int] = {}  # text -> its place in `texts`
    return {"runs": {str(row.path): _details(row, folder, shared) for row in rows}, "texts": list(shared)}


def _details(row, folder, shared):
    provenance, beside = row.record["provenance"], row.path.parent
    return {
        "variant": row.variant,
        "outcome": row.outcome,
        "block": row.block,
        "facts": _facts(row, provenance),
        "command": rerun_command.rerun_command(row),
        "config": [
            [key, _shown(row.config[key]), None if default is None else _shown(default)]
            for key, default in differences(row.config).items()
        ],
        "keys": len(row.config),
        "numbers": {
            key: [value, shared.setdefault(_source(row, key), len(shared))] for key, value in row.values.items()
        },
        "notes": timing_notes.notes(row.record),
        "log": "" if row.ok else row.tail(),
        "sample": _sample(row),
        "files": {name: _link(beside / name, folder) for name in _FILES if files.is_file(beside / name)},
    }


def _facts(row, provenance):
    git, versions = provenance.get("git") or {}, provenance.get("versions") or {}
    commit = git.get("commit")
    facts = {
        "task": row.task,
        "device": groups.device(row),
        "started": provenance.get("started"),
        "ended": provenance.get("ended"),
        "commit": commit and f"{commit[:12]}{', with changes that are not committed' if git.get('dirty') else ''}",
        "versions": ", ".join(f"{name} {versions[name]}" for name in ("python", "jax", "flax") if versions.get(name)),
    }
    return {name: str(value) for name, value in facts.items() if value}


def _source(row, key):
    """The source of a number, or the reason why it is null."""
    return (row.reasons.get(key) if row.values[key] is None else row.source(key)) or ""


def _shown(value):
    text = rerun_command.literal(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _sample(row):
    """Generated text of a run: the first completions of inference, the sample in the log of training, or nothing."""
    file, log = row.path.parent / "samples" / "generated.jsonl", row.path.parent / "log.txt"
    if files.is_file(file):
        try:
            completions = [json_text.parse(line, file) for line in file_excerpts.read_beginning(file).splitlines()[:3]]
            return "\n\n".join(f"{completion['prompt']}\n→ {completion['answer']}" for completion in completions)[
                :_LONGEST
            ]
        except (UserError, KeyError):
            return ""  # a damaged sample file must not cost the report its row
    lines = file_excerpts.read_end(log).splitlines()
    return next((line[len(_SAMPLE) :][:_LONGEST] for line in reversed(lines) if line.startswith(_SAMPLE)), "")


def _link(file, folder):
    return urllib.parse.quote(os.path.relpath(file, folder).replace(os.sep, "/"))
