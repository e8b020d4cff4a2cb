"""Sentences on what limits a row's times: a machine that was not quiet, times not settled, steps left out."""

from efficientllm.typing import Record


def notes(record: Record) -> list[str]:
    """Sentences on what limits the times of a row. Rows of older versions have fewer fields, and fewer notes."""
    sentences, warm_up, conditions = [], record.get("warm_up") or {}, record.get("conditions") or {}
    if conditions.get("starved"):
        reasons = "; ".join(map(str, conditions.get("reasons") or ()))
        sentences.append(f"starved, other programs used the machine: {reasons}; its times are not its technique's")
    if stopped := conditions.get("stopped_s"):
        sentences.append(f"the process was stopped for {stopped:.1f} s, left out of its times")
    if warm_up.get("settled") is False:
        discarded = len(warm_up.get("discarded_s") or ())
        sentences.append(f"not settled: times still varied by more than 2 % when {discarded} were discarded as warm-up")
    if step := (record.get("provenance") or {}).get("resumed_from_step"):
        sentences.append(f"resumed from step {step}: times, energy and wall clock are those of its last part")
    if interrupted := warm_up.get("interrupted_steps"):
        sentences.append(f"{interrupted} step(s) or repeat(s) within which it was stopped are left out")
    if profiled := warm_up.get("profiled_steps"):
        sentences.append(f"{profiled} step(s) that were profiled are left out")
    return sentences
