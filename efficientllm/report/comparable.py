"""What must be equal for rows to be compared: what was run, on what and under which conditions, by content.

Names, paths and the text of a spec decide nothing where the row knows the content: two folders of the same documents
are one data set, and one path whose files have changed is two. What a row does not say (it is null) differs from
nothing, but for the scope of energy.
"""

import re
import zlib

from efficientllm.report import columns

_ENERGY = re.compile(r"\((\w+), ([\w+-]+)")  # "nvml counter (measured, gpu, edges +-0.8 %)"


def device(row):
    """What the run ran on: `2 x NVIDIA H100`; of a CPU also the processor, as XLA calls every CPU `cpu`."""
    devices = row.record["provenance"].get("devices") or {}
    kind = devices.get("kind") or "unknown device"
    if devices.get("platform") == "cpu":
        processor = (row.record["provenance"].get("host") or {}).get("processor") or {}
        kind = f"{processor.get('name') or kind}, {processor.get('cores')} cores"
    return f"{devices.get('count') or 1} x {kind}"


def batch(row):
    """The effective batch: sequences and tokens a step (requests and prompts where the task is infer)."""
    config = row.config
    if row.kind == "infer":
        keys = ("infer.batch_size", "infer.prompt_length", "infer.max_new_tokens", "infer.prompts")
        return ", ".join(f"{key.partition('.')[2]} {_brief(config[key])}" for key in keys if key in config)
    return f"{config.get('train.batch_size')} x {config.get('train.length')} tokens a step"


def _brief(value):
    """A value that stays another where it is cut short."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:32]}... #{zlib.crc32(text.encode()):08x}"


def differences(rows, reference, key, whose="the baseline's"):
    """How the first row whose metric may not be compared with `reference`'s differs, in words; None where all may."""
    for row in rows:
        for what, (value, expected) in _facts(row, reference, key).items():
            if value != expected and (what.startswith(("kind of energy", "energy")) or None not in (value, expected)):
                return f"another {what} than {whose}: {value}, not {expected}"
    return None


def _facts(row, reference, key):
    """`{what: (of the row, of the reference)}` of all that this metric asks to be equal, beyond a group's key."""
    if columns.is_exact(key):
        return {}
    found = {}
    if columns.is_energy(key):
        kinds = [_ENERGY.search(each.source(key)) for each in (row, reference)]
        found["kind of energy figure"] = tuple(kind and kind[1] for kind in kinds)
        found["energy scope"] = tuple(kind and kind[2] for kind in kinds)
    if row.kind != "infer" or key in columns.QUALITY:
        found |= training(row, reference, key)
    if columns.is_timed(key):
        found |= machine(row, reference)
    if key.startswith(("amu", "peak_memory")):
        found["allocator"] = tuple(_allocator(each) for each in (row, reference))
    return found


def training(row, reference, key=""):
    """What the rows were trained on and scored on, as `{what: (of the row, of the reference)}`."""
    both = (row, reference)
    steps = tuple(each.config.get("train.steps") for each in both) if row.kind != "infer" else (None, None)
    found = {"number of tokens": tuple(map(_tokens, both)), "number of steps": steps, "data": _data(*both)}
    if key in columns.QUALITY:
        found["number of held-out batches"] = tuple(each.config.get("eval.batches") for each in both)
    if key != "bits_per_byte":
        found["tokenizer"] = tuple(each.config.get("tokenizer") for each in both)
        if found["tokenizer"][0] == found["tokenizer"][1] and found["data"][0] == found["data"][1]:
            found["tokenizer"] = _content_of_tokenizer(*both)
    return found


def machine(row, reference):
    """Versions and limits that times and power depend on."""
    both = [each.record["provenance"] for each in (row, reference)]
    versions = [found.get("versions") or {} for found in both]
    found = {f"version of {name}": tuple(each.get(name) for each in versions) for name in ("jax", "jaxlib")}
    found["power limit"] = tuple(_limits(each) for each in both)
    found["model of the processor"] = tuple(_processor(each).get("model") for each in both)
    found["source of power"] = tuple((each.get("host") or {}).get("power_source") for each in both)
    if all("xla_flags" in each for each in both):
        found["XLA_FLAGS"] = tuple(each["xla_flags"] or "none" for each in both)
    return found


def in_blocks(rows):
    """Whether these rows are of randomised blocks on one machine, in which what disturbs one disturbs all."""
    hosts = {(row.record["provenance"].get("host") or {}).get("name_hash") for row in rows}
    return len(hosts) == 1 and all("block" in row.sweep and "search" not in row.sweep for row in rows)


def starved(rows):
    """Why the times of these rows are not compared outside of a randomised block, or None: the first starved one."""
    row = next((row for row in rows if row.starved), None)
    return row and f"the machine was not that of {row.variant}, {row.block} alone: {row.starved_by}"


def _tokens(row):
    shape = [row.config.get(f"train.{part}") for part in ("steps", "batch_size", "length")]
    if row.kind == "infer" or not all(isinstance(part, int) for part in shape):
        return None
    steps, rows, length = shape
    return steps * rows * length


def _data(row, reference):
    """The data of both: by fingerprint where both know it, else by their specs."""
    both = (row, reference)
    specs = [each.config.get("data") for each in both]
    prints = [_described(each).get("fingerprint") for each in both]
    if None in prints:
        return tuple(specs)
    if prints[0] == prints[1]:
        return prints[0], prints[1]
    return tuple(f"{spec} (content {found[:12]})" for spec, found in zip(specs, prints, strict=True))


def _content_of_tokenizer(row, reference):
    """Of one spec and one corpus: the tokens that it makes of the corpus."""
    counts = [_described(each).get("train_tokens") for each in (row, reference)]
    if None in counts or counts[0] == counts[1]:
        return None, None
    return tuple(
        f"{each.config.get('tokenizer')} ({n} tokens)" for each, n in zip((row, reference), counts, strict=True)
    )


def _described(row):
    return row.record["provenance"].get("data") or {}


def _limits(provenance):
    limits = (provenance.get("devices") or {}).get("power_limit_w")
    return limits if isinstance(limits, list) and limits and None not in limits else None


def _processor(provenance):
    return (provenance.get("host") or {}).get("processor") or {}


def _allocator(row):
    found = row.record["provenance"].get("allocator")
    return None if found is None else {key: value for key, value in found.items() if value is not None}
