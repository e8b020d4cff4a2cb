"""What may be compared, and what a group says of it."""

import json
import math

import numpy as np
import pytest

from efficientllm.report import board, comparison, rows
from report import made


def groups(*paths, baseline=None):
    return comparison.groups(rows.read(rows.find(paths)[0]), baseline)


def test_ratios_are_paired_with_the_mean_of_the_blocks_baselines(tmp_path):
    (group,) = groups(made.sweep(tmp_path, blocks=3, noise=0.05))
    of = {(row.block, row.variant, row.order): row.values["al_s"] for row in group.rows}
    expected = [
        math.log(of[f"attention {b}", "mla", 2]) - np.log([of[f"attention {b}", "gqa", o] for o in (0, 3)]).mean()
        for b in range(3)
    ]
    assert np.allclose(group.logs("al_s", ["mla"])[0], expected)


def test_a_sweep_finds_what_was_put_in(tmp_path):
    (group,) = groups(made.sweep(tmp_path, blocks=6))
    cells, wins = group.compare("al_s", "lower")
    assert cells["mla"]["low"] < 1.3 < cells["mla"]["high"] and cells["mla"]["verdict"] == "worse"
    assert cells["mqa"]["verdict"] == "better" and cells["mqa"]["rank"] == 1 and cells["mqa"]["rank_high"] == 1
    assert wins["mqa"]["mla"] == 1 and "ratio" not in cells["gqa"]
    assert cells["mla"]["n"] == 6 and cells["gqa"]["n"] == 12


def test_devices_batches_and_tasks_never_share_a_group(tmp_path):
    made.row(tmp_path / "a", al_s=0.5)
    made.row(tmp_path / "b", "mla", devices=made.H100, al_s=0.5)
    made.row(tmp_path / "c", "mla", changes={"train.batch_size": 16}, al_s=0.5)
    made.row(tmp_path / "d", "mla", task="infer", al_s=0.5)
    found = groups(tmp_path)
    assert len(found) == 4 and all(len(group.variants) == 1 for group in found)


def test_energy_of_another_scope_is_shown_and_not_ranked(tmp_path):
    made.row(tmp_path / "a", "gqa", aec_w=300.0, al_s=0.5)
    made.row(tmp_path / "b", "mla", seed=0, aec_w=310.0, al_s=0.5, energy="nvml energy counter (measured, module)")
    made.row(tmp_path / "c", "mqa", seed=0, aec_w=310.0, al_s=0.5)
    (group,) = groups(tmp_path, baseline="model.mixer=gqa")
    cells, _ = group.compare("aec_w", "lower")
    refused = cells["model.mixer=mla"]
    assert "energy scope" in refused["reason"] and "module, not gpu" in refused["reason"] and refused["mean"] == 310
    assert "rank" not in refused and "ratio" not in refused
    assert "ratio" in cells["model.mixer=mqa"] and group.compare("al_s", "lower")[0]["model.mixer=mla"]["ratio"] == 1


@pytest.mark.parametrize(
    ("changes", "metric", "said"),
    [
        ({"train.steps": 200}, "eval_loss", "number of tokens"),
        ({"data": "text(path='x')"}, "bits_per_byte", "data"),
        ({"tokenizer": "bpe(vocab_size=9)"}, "eval_loss", "tokenizer"),
        ({"tokenizer": "bpe(vocab_size=9)"}, "bits_per_byte", None),
        ({"train.steps": 200}, "al_s", None),
    ],
)
def test_quality_is_compared_at_equal_tokens_data_and_tokenizer(tmp_path, changes, metric, said):
    made.row(tmp_path / "a", "gqa", seed=0, **{metric: 2.0})
    made.row(tmp_path / "b", "mla", seed=0, changes=changes, **{metric: 3.0})
    (group,) = groups(tmp_path)
    reason = group.refusal(group.variants[1], metric)
    assert reason is None if said is None else said in reason


def test_predicted_rows_are_a_group_of_their_own_and_never_ranked(tmp_path):
    made.row(tmp_path / "a", "gqa", al_s=0.5)
    made.row(tmp_path / "b", "mla", task="plan", al_s=0.1)
    measured, predicted = sorted(groups(tmp_path), key=lambda group: group.task != "pretrain")
    assert (
        "predicted" in predicted.task and predicted.refusal(predicted.variants[0], "al_s") == "predicted, not measured"
    )
    assert len(measured.variants) == 1


def test_failed_rows_stay_typed_and_count_for_nothing(tmp_path):
    made.sweep(tmp_path, blocks=2)
    told = {"name": "attention", "variant": "mha", "baseline": "gqa", "block": 0, "order": 9, "seed": 0}
    made.row(tmp_path / "oom", "mha", outcome="oom", sweep=told, params_total=5.0)
    (group,) = groups(tmp_path)
    assert group.refusal("mha", "params_total") == "no run ended well (oom)"
    made_board = board.build(rows.read(rows.find([tmp_path])[0]))
    (failure,) = made_board["failures"]
    assert (failure["variant"], failure["outcome"]) == ("mha", "oom")
    (mha,) = [v for v in made_board["groups"][0]["variants"] if v["variant"] == "mha"]
    assert mha["outcomes"] == {"oom": 1} and mha["cells"]["params_total"]["mean"] is None


def test_a_baseline_without_rows_leaves_values_without_ratios(tmp_path):
    told = {"name": "attention", "variant": "mla", "baseline": "gqa", "block": 0, "order": 0, "seed": 0}
    made.row(tmp_path, "mla", sweep=told, al_s=0.5)
    (group,) = groups(tmp_path)
    assert group.baseline is None and group.refusal("mla", "al_s") == "the baseline has no row here"


def test_noise_from_first_and_last_baseline_and_from_twins(tmp_path):
    (group,) = groups(made.sweep(tmp_path / "sweep", blocks=6, noise=0.02))
    found = group.noise("al_s")
    assert found.interval.blocks == 6 and 0.01 < found.spread < 0.06
    for seed in range(4):
        for name in ("a", "b"):
            told = {"name": "aa", "variant": name, "baseline": "a", "block": seed, "order": 0, "seed": seed}
            made.row(tmp_path / "aa" / f"{name}{seed}", sweep=told, seed=seed, al_s=0.5 + 0.01 * seed * (name == "b"))
    (twins,) = groups(tmp_path / "aa")
    assert twins.twins() == ["b"] and twins.noise("al_s").interval.blocks == 4


def test_a_leaderboard_is_the_same_twice_and_plain_json(tmp_path):
    made.sweep(tmp_path, blocks=3)
    first, second = (json.dumps(board.build(rows.read(rows.find([tmp_path])[0])), allow_nan=False) for _ in range(2))
    assert first == second
    group = json.loads(first)["groups"][0]
    assert group["score"]["over"] == ["gqa", "mqa", "mla"] and "aec_w" not in group["score"]["of"]
    assert group["pareto"]["al_s|flops_per_token"] == pytest.approx({"gqa": 0.0, "mqa": 1.0, "mla": 0.0}, abs=0.01)
    assert 0 < group["pareto"]["al_s|eval_loss"]["gqa"] < 1, "mqa is faster, and its loss the same but for noise"


def test_the_studys_rows_stand_beside_ours(tmp_path):
    made.sweep(tmp_path, blocks=6)
    (entry,) = board.build(rows.read(rows.find([tmp_path])[0]))["groups"][0]["study"]
    of = {(row["variant"], row["metric"]): row for row in entry["rows"]}
    assert of["mla", "amu_gb"]["study_ratio"] == pytest.approx(52.93 / 44.87)
    assert of["mla", "al_s"]["agrees"] == "same side" and of["mqa", "al_s"]["agrees"] == "other side"
    assert of["mla", "aec_w"]["agrees"] == "not measured here" and "digest" in entry["trust"]
