"""What a reader of a row's times must know: an unquiet machine, times that had not settled, steps left out."""


def notes(record):
    """One sentence each, of a row as plain data; rows of older versions say less."""
    said, warm_up, conditions = [], record.get("warm_up") or {}, record.get("conditions") or {}
    if conditions.get("starved"):
        reasons = "; ".join(map(str, conditions.get("reasons") or ()))
        said.append(f"starved, the machine was not this run's alone: {reasons}; its times are not its technique's")
    if stopped := conditions.get("stopped_s"):
        said.append(f"the process was stopped for {stopped:.1f} s, left out of its times")
    if warm_up.get("settled") is False:
        aside = len(warm_up.get("discarded_s") or ())
        said.append(f"not settled: times still varied by more than 2 % when {aside} were set aside as warm-up")
    if step := (record.get("provenance") or {}).get("resumed_from_step"):
        said.append(f"resumed from step {step}: times, energy and wall clock are those of its last part")
    if interrupted := warm_up.get("interrupted_steps"):
        said.append(f"{interrupted} step(s) or repeat(s) within which it was stopped are left out")
    return said
