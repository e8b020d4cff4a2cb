"""Held-out losses of one block, compared by the parts of the text that both were scored on."""

import json
import math

import numpy as np
import pytest

from efficientllm.report import find_rows, groups, pairwise, statistics
from report import made

pytestmark = pytest.mark.quick


def form(out, name, losses, task="infer", weights=None):
    """A row of inference in a form of the weights, with its loss on each part of the text."""
    told = {"name": "forms", "variant": name, "baseline": "float32", "block": 0, "order": 0, "seed": 0}
    changes = {"task": task, "quant": name}
    mean = float(np.mean(losses))
    means = {"eval_loss": mean, "perplexity": math.exp(mean)}
    path = made.row(out / name, sweep=told, task=task, told={"run": name}, changes=changes, **means)
    record = json.loads(path.read_text())
    record["sources"]["eval_loss"]["parts"] = [
        [loss, w] for loss, w in zip(losses, weights or [1.0] * 99, strict=False)
    ]
    path.write_text(json.dumps(record))


def group_of(out):
    return groups.group_rows(find_rows.collect_rows([out]).rows)[0]


def test_forms_are_compared_row_by_row_of_text(tmp_path):
    rng = np.random.default_rng(0)
    hard = rng.uniform(1, 5, 40)  # rows of text differ far more than forms do
    form(tmp_path, "float32", hard.tolist())
    form(tmp_path, "int8", (hard * np.exp(rng.normal(0.0, 0.002, 40))).tolist())
    form(tmp_path, "int4", (hard * np.exp(rng.normal(0.05, 0.01, 40))).tolist())
    group = group_of(tmp_path)
    interval, reason = group.between("eval_loss", "int4", "float32")
    assert reason is None and interval.method == "t over 40 parts of the held-out text"
    assert interval.low < math.exp(0.05) < interval.high and interval.high - interval.low < 0.02
    cell = group.compare("eval_loss", "lower")[0]["int4"]
    assert (cell["low"], cell["high"]) == (interval.low, interval.high) and cell["verdict"] == "worse"
    perplexities, reason = group.between("perplexity", "int4", "float32")
    assert reason is None and perplexities.method == interval.method
    assert perplexities.low > interval.high, "of losses above 1 nat, perplexities differ by more than losses"
    (counts,) = pairwise.compare_quality([group])
    assert counts["significant"] == 2 and counts["bounded"] == 1 and counts["open"] == 0


def test_the_interval_covers_as_often_as_it_says():
    """The share of 95 % intervals that hold the true ratio, of 2,000 draws of 20 parts: within three deviations."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(2000):
        base = rng.uniform(1, 5, 20)
        interval = statistics.ratio_of_sums(1.02 * base * rng.normal(1, 0.01, 20), base)
        held += interval.low <= 1.02 <= interval.high
    assert abs(held / 2000 - 0.95) < 3 * math.sqrt(0.05 * 0.95 / 2000) + 0.005


def test_the_interval_of_perplexities_covers_as_often_as_it_says():
    """As above, of parts of unequal weight."""
    rng, covered = np.random.default_rng(2), 0
    for _ in range(2000):
        weights = rng.uniform(100, 200, 20)
        base = weights * rng.uniform(1, 5, 20)
        interval = statistics.ratio_of_perplexities(base + weights * rng.normal(0.05, 0.02, 20), base, weights)
        covered += interval.low <= math.exp(0.05) <= interval.high
    assert abs(covered / 2000 - 0.95) < 3 * math.sqrt(0.05 * 0.95 / 2000) + 0.005


@pytest.mark.parametrize("spoil", ["weights", "training", "words", "one"])
def test_other_text_training_or_broken_parts_have_no_interval(spoil, tmp_path):
    task = "pretrain" if spoil == "training" else "infer"
    losses = {"words": ["a", "b"], "one": [2.0]}.get(spoil, [2.0, 3.0])
    form(tmp_path, "float32", [2.0, 3.0], task)
    weights = [1.0, 2.0] if spoil == "weights" else None
    if spoil == "words":
        form(tmp_path, "int8", [2.0, 3.0], task)
        path = tmp_path / "int8" / "record.json"
        record = json.loads(path.read_text())
        record["sources"]["eval_loss"]["parts"] = losses
        path.write_text(json.dumps(record))
    else:
        form(tmp_path, "int8", losses, task, weights)
    interval, reason = group_of(tmp_path).between("eval_loss", "int8", "float32")
    assert reason is None and interval.low is None and interval.method == "one block: no interval"
