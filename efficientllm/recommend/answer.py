"""The answer: a short table, why the others fell out, how sure it is, and the command line; as text and for JSON."""

from __future__ import annotations

import collections
import shlex
import textwrap
import typing

from efficientllm.plan.hardware import Hardware
from efficientllm.recommend import search
from efficientllm.recommend.evidence import Figure, share_of_wins
from efficientllm.recommend.request import Request
from efficientllm.recommend.search import Entry, Exclusion, Result, columns_of
from efficientllm.report import columns
from efficientllm.report.columns import format_value

WIDTH = 100
SURE = 0.975  # share of draws in which one beats the other, beyond which a difference is significant
TIED = 1e-6
_REASONS = {
    search.NO_EVIDENCE: "without evidence",
    search.QUALITY: "beyond a limit, by evidence",
    search.MEMORY_LIMIT: "do not fit into memory",
    search.LIMIT: "beyond a limit, planned",
    search.REFUSED: "cannot be run so",
    search.WORSE: "worse than the runner-up",
}
# Sweeps that supply evidence, by task.
SWEEPS = {"pretrain": "attention", "tune": "tuning", "infer": "quantization"}
_COSTS = {
    "pretrain": ("peak_memory_bytes", "al_s", "tokens_per_s", "usd_per_run"),
    "tune": ("peak_memory_bytes", "al_s", "tokens_per_s", "usd_per_run"),
    "infer": ("peak_memory_bytes", "resident_weight_bytes", "ttft_s", "tpot_s", "tokens_per_s", "usd_per_mtoken"),
}
_NAMES = 4  # techniques named of those that fell out for one reason


def command(request: Request, entry: Entry) -> str:
    """The command line that runs an entry."""
    argv = request.argv(entry.technique.config, entry.candidate.all_changes, to_run=True)
    argv = [argument.replace("'", '"') if '"' not in argument else argument for argument in argv]  # fewer quotes
    return shlex.join(["python", "-m", "efficientllm.main", *argv])


def sweep_command(request: Request, keys: tuple[str, ...]) -> str:
    """The sweep that would supply evidence of metrics."""
    name = SWEEPS[request.task]
    model = request.model_flags(to_run=True)
    flags = [f"--config.{key}={value}" for key, value in model.items() if value != ""]
    sweep = [f"--config=experiments/{name}/sweep.py", f"--out=runs/{name}", *flags]
    return shlex.join(["python", "-m", "efficientllm.sweep", *sweep])


def text(request: Request, result: Result) -> str:
    """The answer as text of at most WIDTH columns, commands aside."""
    if not result.entries:
        return "\n".join([*_no_answer(request, result), *_excluded(result.exclusions)])
    best, second = result.entries[0], next(iter(result.entries[1:]), None)
    lines = [_heading(request, result), "", *_table(request, result, best, second), ""]
    lines += [*_certainty(request, result, best, second), *_excluded(_with_others(result)), "", command(request, best)]
    return "\n".join(lines)


def _heading(request, result):
    size = format_value(result.parameters, "1")
    room = format_value(request.hardware.memory_bytes, "bytes")
    named = "this machine" if request.is_here else request.hardware.name
    order = f"{'most' if result.most else 'least'} {result.goal}"
    return f"{request.task} {request.model} ({size} parameters) on {request.devices} x {named} ({room} each): {order}"


def _table(request, result, best, second):
    entries = [("choice", best)] + ([("runner-up", second)] if second else [])
    names = [textwrap.wrap(entry.technique.name, 34) or [""] for _, entry in entries]
    rows = [["", *(label for label, _ in entries)]]
    rows += [
        ["technique" if line == 0 else "", *(name[line] if line < len(name) else "" for name in names)]
        for line in range(max(map(len, names)))
    ]
    rows.append(["setting", *(_setting(entry) for _, entry in entries)])
    units = columns_of()
    shown = dict.fromkeys((*request.query.keys, result.goal, *_COSTS[request.task]))
    for key in shown:
        cells = [_cell(entry, key, units[key].unit) for _, entry in entries]
        if any(cells):
            rows.append([columns.LABELS.get(key, key), *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _setting(entry):
    values = [f"{key.rpartition('.')[2]} {value}" for key, value in entry.candidate.changes.items()]
    return ", ".join(values) or "as the preset"


def _cell(entry, key, unit):
    figure = entry.figures.get(key)
    if figure is not None:
        return f"{format_value(figure.mean, unit)} measured" if columns.is_timed(key) else figure.text
    value = entry.candidate.metrics.get(key)
    return "" if value is None else f"{format_value(value, unit)} planned"


def _certainty(request, result, best, second):
    lines = []
    for key, figure in best.figures.items():
        lines.append(f"{key}: {figure.text}{_baseline(figure)}; {_origin(figure, result.parameters)}")
    for condition in request.query.conditions:
        if condition.key in best.figures and not best.figures[condition.key].is_sure(condition):
            lines.append(f"not sure: the interval of {condition.key} reaches beyond {condition.text!r}")
    if any(key not in best.figures for key in best.candidate.metrics):
        lines.append("planned: by shapes and the device's peaks; times are the least there can be")
    if result.beside:
        units, (first, *_) = columns_of(), result.beside.values()
        shown = (
            f"{columns.LABELS.get(key, key)} {format_value(figure.mean, units[key].unit)}"
            for key, figure in result.beside.items()
        )
        lines.append(f"the choice measured on this device, {first.variant.group['batch']}: {', '.join(shown)}")
    for entry_name, size in result.compiled.items():
        lines.append(f"by the compiler {entry_name} needs {format_value(size, 'bytes')}")
    if second is not None:
        lines += _difference(result, best, second)
    return ["how sure", *(line for text in lines for line in _wrapped(text))]


def _baseline(figure):
    return "" if figure.variant.is_baseline else f" of {figure.variant.group['baseline']}'s"


def _origin(figure: Figure, parameters: float) -> str:
    """Where a figure is from, and how far that is from what was asked."""
    measured = format_value(figure.variant.parameters, "1")
    asked = format_value(parameters, "1")
    far = f"measured on {measured}, asked for {asked}: {figure.apart:.3g}x apart"
    place = far if figure.is_far else f"measured on {measured}, as asked"
    of = f"{figure.variant.group['sweep'] or 'runs'} of {figure.variant.board} on {figure.variant.group['device']}"
    return f"{place}; {figure.n} runs of {figure.variant.group['batch']}, {of}"


def _difference(result, best, second):
    a, b = best.value, second.value
    if abs(a - b) <= TIED * max(abs(a), abs(b)):
        equal = [e.technique.name for e in result.entries if abs(e.value - a) <= TIED * abs(a)]
        return [f"tied in {result.goal}: {', '.join(equal)}; chosen by evidence, memory and name, in this order"]
    lines = [f"{result.goal} of the runner-up is {b / a:.3g}x the choice's: {_significance(best, second, result.goal)}"]
    for key in best.figures.keys() & second.figures.keys() - {result.goal}:
        lines.append(f"{key} of choice and runner-up: {_significance(best, second, key)}")
    return lines


def _significance(best, second, key):
    if key not in best.figures or key not in second.figures:
        return "planned, which has no interval"
    share = share_of_wins(best.figures[key], second.figures[key])
    if share is None:
        return "they were not measured in one sweep, or in too few blocks to tell"
    if share >= SURE or share <= 1 - SURE:
        word = "better" if share >= SURE else "worse"
        return f"significant (the choice is {word} in {max(share, 1 - share):.1%} of draws)"
    return f"not significant (the choice is better in {share:.0%} of draws)"


def _with_others(result):
    """Exclusions, with the entries behind the runner-up."""
    others = [Exclusion(entry.technique, search.WORSE, "") for entry in result.entries[2:]]
    return [*result.exclusions, *others]


def _excluded(exclusions):
    if not exclusions:
        return []
    by_kind = collections.defaultdict(list)
    for exclusion in exclusions:
        by_kind[exclusion.kind].append(exclusion)
    lines = ["fell out"]
    for kind, group in sorted(by_kind.items()):
        whys = {exclusion.why for exclusion in group}
        reason = f" ({whys.pop()})" if len(whys) == 1 and len(group) > 1 and whys != {""} else ""
        named = [
            exclusion.technique.name + (f" ({exclusion.why})" if exclusion.why and not reason else "")
            for exclusion in group[:_NAMES]
        ]
        more = f", and {len(group) - _NAMES} more" if len(group) > _NAMES else ""
        lines += _wrapped(f"{len(group)} {_REASONS[kind]}{reason}: {', '.join(named)}{more}")
    return lines


def _no_answer(request, result):
    lines = [_heading(request, result), ""]
    if result.missing or not any(exclusion.kind != search.NO_EVIDENCE for exclusion in result.exclusions):
        keys = result.missing or tuple(request.query.keys)
        what = ", ".join(result.missing) or "what is asked for"
        lines += _wrapped(f"no answer: no evidence of {what}. This would supply it:", 0)
        return [*lines, "", sweep_command(request, keys), ""]
    return [*lines, "no answer: nothing keeps all limits"]


def _wrapped(line, indent=2):
    return textwrap.wrap(line, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * (indent + 2))


def as_json(request: Request, result: Result) -> dict[str, typing.Any]:
    """The answer as plain data."""
    entries = result.entries
    answer: dict[str, typing.Any] = {
        "task": request.task,
        "model": request.model,
        "parameters": result.parameters,
        "device": _device(request.hardware),
        "devices": request.devices,
        "goal": {"metric": result.goal, "most": result.most},
        "choice": _entry(request, result, entries[0]) if entries else None,
        "runner_up": _entry(request, result, entries[1]) if len(entries) > 1 else None,
        "others": [entry.technique.name for entry in entries[2:]],
        "fell_out": [
            {"technique": exclusion.technique.name, "reason": _REASONS[exclusion.kind], "why": exclusion.why}
            for exclusion in result.exclusions
        ],
        "missing": list(result.missing),
    }
    if len(entries) > 1:
        answer["difference"] = _difference(result, *entries[:2])
    if not entries and result.missing:
        answer["supply"] = sweep_command(request, result.missing)
    return answer


def _device(hardware: Hardware) -> dict[str, typing.Any]:
    return {"name": hardware.name, "kind": hardware.device_kind, "memory_bytes": hardware.memory_bytes}


def _entry(request, result, entry):
    return {
        "technique": entry.technique.name,
        "setting": entry.candidate.changes,
        "value": entry.value,
        "measured": entry.is_measured,
        "planned": entry.candidate.metrics,
        "compiled_bytes": result.compiled.get(entry.technique.name),
        "evidence": {key: _figure(figure) for key, figure in entry.figures.items()},
        "command": command(request, entry),
    }


def _figure(figure):
    return {
        "ratio": figure.ratio,
        "low": figure.low,
        "high": figure.high,
        "runs": figure.n,
        "baseline": figure.variant.group["baseline"],
        "measured_parameters": figure.variant.parameters,
        "apart": figure.apart,
        "board": figure.variant.board,
        "sweep": figure.variant.group["sweep"],
        "device": figure.variant.group["device"],
    }
