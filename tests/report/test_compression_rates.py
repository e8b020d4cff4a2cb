"""MCR of a sweep's forms, which follows from its rows."""

import json
import math

import numpy as np
import pytest

from efficientllm.infer import row as infer_row
from efficientllm.objectives.next_token import NextToken
from efficientllm.report import find_rows, groups
from report import made

pytestmark = pytest.mark.quick
TOKENS_PER_BYTE = 0.25


def form(out, name, size, nats, text="a", baseline="float32"):
    """A row of inference with weights of `size` bytes and a loss of `nats` a token on each part of the text."""
    told = {"name": "forms", "variant": name, "baseline": baseline, "block": 0, "order": 0, "seed": 0}
    mean = float(np.mean(nats))
    values = {"eval_loss": mean, "bits_per_byte": mean * TOKENS_PER_BYTE / math.log(2), "resident_weight_bytes": size}
    path = made.row(
        out / name,
        sweep=told,
        task="infer",
        told={"run": name, "data": {"fingerprint": text}},
        changes={"task": "infer", "quant": name},
        **values,
    )
    record = json.loads(path.read_text())
    record["sources"]["eval_loss"]["parts"] = [[loss, 1.0] for loss in nats]
    path.write_text(json.dumps(record))


def group_of(out):
    return groups.group_rows(find_rows.collect_rows([out]).rows)[0]


def test_the_rate_is_what_a_run_beside_its_baseline_records(tmp_path):
    random = np.random.default_rng(0)
    nats = random.uniform(1, 5, 40)
    form(tmp_path, "float32", 400, nats.tolist())
    form(tmp_path, "bfloat16", 200, (nats + random.normal(0, 1e-3, 40)).tolist())
    form(tmp_path, "int4", 80, (nats + random.normal(0.1, 0.05, 40)).tolist())
    group = group_of(tmp_path)
    values = {variant: group.of(variant)[0].values for variant in group.variants}
    assert values["float32"]["mcr"] == 1
    scored = [
        infer_row.ScoredForm(name, values[name]["resident_weight_bytes"], values[name]["bits_per_byte"])
        for name in ("float32", "int4")
    ]
    of_a_run = infer_row.compression(NextToken(), *scored)
    size_ratio = of_a_run.original_bytes / of_a_run.compressed_bytes
    recorded = size_ratio * of_a_run.compressed_quality / of_a_run.original_quality  # Eq. 9
    assert values["int4"]["mcr"] == pytest.approx(recorded, rel=1e-12)
    assert "and of float32's (Eq. 9)" in group.of("int4")[0].source("mcr")
    interval, reason = group.between("mcr", "int4", "bfloat16")
    assert reason is None and interval.method == "t over 40 parts of the held-out text"
    assert interval.ratio == pytest.approx(values["int4"]["mcr"] / values["bfloat16"]["mcr"])
    assert 200 / 80 * math.exp(-0.12 * TOKENS_PER_BYTE) < interval.low < interval.high < 200 / 80


def test_no_rate_of_another_text_or_from_a_compressed_baseline(tmp_path):
    form(tmp_path / "texts", "float32", 400, [1.0, 2.0])
    form(tmp_path / "texts", "int4", 80, [1.1, 2.1], text="b")
    form(tmp_path / "int8", "int8", 100, [1.0, 2.0], baseline="int8")
    form(tmp_path / "int8", "int4", 80, [1.1, 2.1], baseline="int8")
    form(tmp_path / "alone", "float32", 400, [1.0, 2.0])
    for folder in ("texts", "int8", "alone"):
        last = group_of(tmp_path / folder).rows[-1]
        assert last.values.get("mcr") is None, folder
