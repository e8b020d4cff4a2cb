"""Comparability of rows: the facts that must be equal before a metric of two rows is compared.

Content counts, not names or paths: two folders of the same documents are one data set, and one path whose files have
changed is two. A fact that a row does not record (null) equals everything, except the scope of energy.
"""

import re
import typing
import zlib
from collections.abc import Sequence

from efficientllm.report import columns, image_facts
from efficientllm.report.rows import Row

Facts = dict[str, tuple[typing.Any, ...]]  # `{fact: (of the row, of the reference)}`
_ENERGY = re.compile(r"\((\w+), ([\w+-]+)")  # "nvml counter (measured, gpu, edges +-0.8 %)"


def device(row: Row) -> str:
    """The devices of a run, `2 x NVIDIA H100`; for a CPU the processor's name, as XLA calls every CPU `cpu`."""
    devices = row.record["provenance"].get("devices") or {}
    kind = devices.get("kind") or "unknown device"
    if devices.get("platform") == "cpu":
        processor = (row.record["provenance"].get("host") or {}).get("processor") or {}
        kind = f"{processor.get('name') or kind}, {processor.get('cores')} cores"
    return f"{devices.get('count') or 1} x {kind}"


def batch(row: Row) -> str:
    """The effective batch: sequences and tokens a step, or pictures and objective; for infer, requests and prompts."""
    config = row.config
    if row.reads == "images":
        return image_facts.batch(row)
    if row.kind == "infer":
        keys = ("infer.batch_size", "infer.prompt_length", "infer.max_new_tokens", "infer.prompts")
        return ", ".join(f"{key.partition('.')[2]} {_brief(config[key])}" for key in keys if key in config)
    return f"{config.get('train.batch_size')} x {config.get('train.length')} tokens a step"


def _brief(value):
    """A value, shortened; a checksum keeps different values different."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:32]}... #{zlib.crc32(text.encode()):08x}"


def find_difference(rows: Sequence[Row], reference: Row, key: str, whose: str = "the baseline's") -> str | None:
    """Describes how the first row that is not comparable with `reference` differs; None if all are comparable."""
    for row in rows:
        for fact, (value, expected) in _facts(row, reference, key).items():
            if value != expected and (fact.startswith(("kind of energy", "energy")) or None not in (value, expected)):
                return f"another {fact} than {whose}: {value}, not {expected}"
    return None


def _facts(row, reference, key):
    """`{fact: (of the row, of the reference)}`: facts that must be equal for this metric, beyond the group's key."""
    if columns.is_exact(key):
        return {}
    facts = {}
    if columns.is_energy(key):
        kinds = [_ENERGY.search(side.source(key)) for side in (row, reference)]
        facts["kind of energy figure"] = tuple(kind and kind[1] for kind in kinds)
        facts["energy scope"] = tuple(kind and kind[2] for kind in kinds)
    if columns.is_cost(key) or columns.is_emission(key):
        setting = "metrics.price" if columns.is_cost(key) else "metrics.carbon"
        facts[setting.replace("metrics.", "")] = tuple(side.config.get(setting) for side in (row, reference))
    if row.kind != "infer" or columns.is_quality(key):
        facts |= training_facts(row, reference, key)
    if columns.is_timed(key):
        facts |= machine_facts(row, reference)
    if key.startswith(("amu", "peak_memory")):
        facts["allocator"] = tuple(_allocator(side) for side in (row, reference))
    return facts


def training_facts(row: Row, reference: Row, key: str = "") -> Facts:
    """Training and evaluation data, as `{fact: (of the row, of the reference)}`."""
    both = (row, reference)
    steps = tuple(side.config.get("train.steps") for side in both) if row.kind != "infer" else (None, None)
    in_images = any(side.reads == "images" for side in both)
    tokens = image_facts.training_facts(both, key) if in_images else {"number of tokens": tuple(map(_tokens, both))}
    facts: Facts = tokens | {"number of steps": steps, "data": _data(*both)}
    if columns.is_quality(key):
        facts["number of held-out batches"] = tuple(side.config.get("eval.batches") for side in both)
    if not in_images and key != "bits_per_byte":
        facts["tokenizer"] = tuple(side.config.get("tokenizer") for side in both)
        if facts["tokenizer"][0] == facts["tokenizer"][1] and facts["data"][0] == facts["data"][1]:
            facts["tokenizer"] = _content_of_tokenizer(*both)
    return facts


def machine_facts(row: Row, reference: Row) -> Facts:
    """Versions, power limits and processors, on which times and power depend."""
    both = [side.record["provenance"] for side in (row, reference)]
    versions = [provenance.get("versions") or {} for provenance in both]
    facts = {f"version of {name}": tuple(side.get(name) for side in versions) for name in ("jax", "jaxlib")}
    facts["power limit"] = tuple(_limits(side) for side in both)
    facts["model of the processor"] = tuple(_processor(side).get("model") for side in both)
    facts["source of power"] = tuple((side.get("host") or {}).get("power_source") for side in both)
    if all("xla_flags" in side for side in both):
        facts["XLA_FLAGS"] = tuple(side["xla_flags"] or "none" for side in both)
    return facts


def in_blocks(rows: Sequence[Row]) -> bool:
    """True for rows of randomised blocks on one machine: a disturbance meets all variants alike."""
    hosts = {(row.record["provenance"].get("host") or {}).get("name_hash") for row in rows}
    return len(hosts) == 1 and all("block" in row.sweep and "search" not in row.sweep for row in rows)


def starved(rows: Sequence[Row]) -> str | None:
    """Why times of these rows are not compared outside randomised blocks: the first starved row; None without one."""
    row = next((row for row in rows if row.starved), None)
    return f"the machine was not that of {row.variant}, {row.block} alone: {row.starved_by}" if row else None


def _tokens(row):
    shape = [row.config.get(f"train.{key}") for key in ("steps", "batch_size", "length")]
    if row.kind == "infer" or not all(isinstance(size, int) for size in shape):
        return None
    steps, rows, length = shape
    return steps * rows * length


def _data(row, reference):
    """The data of both rows: fingerprints if both record one, else the specs."""
    both = (row, reference)
    specs = [side.config.get("data") for side in both]
    fingerprints = [_described(side).get("fingerprint") for side in both]
    if None in fingerprints:
        return tuple(specs)
    if fingerprints[0] == fingerprints[1]:
        return fingerprints[0], fingerprints[1]
    return tuple(f"{spec} (content {fingerprint[:12]})" for spec, fingerprint in zip(specs, fingerprints, strict=True))


def _content_of_tokenizer(row, reference):
    """Token counts, for tokenizers of one spec on one corpus that still differ."""
    counts = [_described(side).get("train_tokens") for side in (row, reference)]
    if None in counts or counts[0] == counts[1]:
        return None, None
    return tuple(
        f"{side.config.get('tokenizer')} ({n} tokens)" for side, n in zip((row, reference), counts, strict=True)
    )


def _described(row):
    return row.record["provenance"].get("data") or {}


def _limits(provenance):
    limits = (provenance.get("devices") or {}).get("power_limit_w")
    return limits if isinstance(limits, list) and limits and None not in limits else None


def _processor(provenance):
    return (provenance.get("host") or {}).get("processor") or {}


def _allocator(row):
    allocator = row.record["provenance"].get("allocator")
    return None if allocator is None else {key: value for key, value in allocator.items() if value is not None}
