"""Groups of comparable rows, and their notes."""

import json
import math

import numpy as np
import pytest

from efficientllm.metrics import conditions
from efficientllm.report import find_rows, leaderboard, markdown, ranking, rows, techniques
from efficientllm.report import groups as comparison
from report import made

pytestmark = pytest.mark.quick


def groups(*paths, baseline=None):
    return comparison.group_rows(rows.read_rows(find_rows.find_files(paths)[0]), baseline)


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
    row_groups = groups(tmp_path)
    assert len(row_groups) == 4 and all(len(group.variants) == 1 for group in row_groups)


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
    ("changes", "metric", "message"),
    [
        ({"train.steps": 200}, "eval_loss", "number of tokens"),
        ({"data": "text(path='x')"}, "bits_per_byte", "data"),
        ({"tokenizer": "bpe(vocab_size=9)"}, "eval_loss", "tokenizer"),
        ({"tokenizer": "bpe(vocab_size=9)"}, "bits_per_byte", None),
        ({"train.steps": 200}, "al_s", "number of tokens"),
        ({"train.steps": 200}, "amu_gb", "number of tokens"),
        ({"train.steps": 200}, "flops_per_token", None),
        ({"eval.batches": 3}, "al_s", None),
    ],
)
def test_what_is_measured_is_compared_at_equal_tokens_data_and_tokenizer(tmp_path, changes, metric, message):
    made.row(tmp_path / "a", "gqa", seed=0, **{metric: 2.0})
    made.row(tmp_path / "b", "mla", seed=0, changes=changes, **{metric: 3.0})
    (group,) = groups(tmp_path)
    reason = group.refusal(group.variants[1], metric)
    assert reason is None if message is None else message in reason


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
    made_board = leaderboard.build_leaderboard(rows.read_rows(find_rows.find_files([tmp_path])[0]))
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
    noise = group.noise("al_s")
    assert noise.interval.blocks == 6 and 0.01 < noise.spread < 0.06
    for seed in range(4):
        for name in ("a", "b"):
            told = {"name": "aa", "variant": name, "baseline": "a", "block": seed, "order": 0, "seed": seed}
            made.row(tmp_path / "aa" / f"{name}{seed}", sweep=told, seed=seed, al_s=0.5 + 0.01 * seed * (name == "b"))
    (twins,) = groups(tmp_path / "aa")
    assert twins.twins() == ["b"] and twins.noise("al_s").interval.blocks == 4


def test_a_leaderboard_is_the_same_twice_and_plain_json(tmp_path):
    made.sweep(tmp_path, blocks=3)
    first, second = (
        json.dumps(leaderboard.build_leaderboard(rows.read_rows(find_rows.find_files([tmp_path])[0])), allow_nan=False)
        for _ in range(2)
    )
    assert first == second
    group = json.loads(first)["groups"][0]
    assert group["score"]["over"] == ["gqa", "mqa", "mla"] and "aec_w" not in group["score"]["of"]
    assert group["pareto"]["al_s|flops_per_token"] == pytest.approx({"gqa": 0.0, "mqa": 1.0, "mla": 0.0}, abs=0.01)
    assert 0 < group["pareto"]["al_s|eval_loss"]["gqa"] < 1, "mqa is faster, and its loss the same but for noise"


def test_the_studys_rows_stand_beside_ours(tmp_path):
    made.sweep(tmp_path, blocks=6)
    (entry,) = leaderboard.build_leaderboard(rows.read_rows(find_rows.find_files([tmp_path])[0]))["groups"][0]["study"]
    of = {(row["variant"], row["metric"]): row for row in entry["rows"]}
    assert of["mla", "amu_gb"]["study_ratio"] == pytest.approx(52.93 / 44.87)
    assert of["mla", "al_s"]["agrees"] == "same side" and of["mqa", "al_s"]["agrees"] == "other side"
    assert of["mla", "aec_w"]["agrees"] == "not measured here" and "digest" in entry["trust"]


DATA = {"source": "text(path='x')", "fingerprint": "a" * 64, "train_tokens": 1000}


@pytest.mark.parametrize(
    ("a", "b", "metric", "message"),
    [
        ({"data": DATA}, {"data": {**DATA, "fingerprint": "b" * 64}}, "al_s", "another data"),
        ({"data": DATA}, {"data": {**DATA, "fingerprint": "b" * 64}}, "bits_per_byte", "another data"),
        ({"data": DATA}, {"data": {**DATA, "train_tokens": 900}}, "eval_loss", "another tokenizer"),
        ({"data": DATA}, {}, "eval_loss", None),
        ({"versions": {"jax": "0.10.2"}}, {"versions": {"jax": "0.12.0"}}, "al_s", "version of jax"),
        ({"versions": {"jax": "0.10.2"}}, {"versions": {"jax": "0.12.0"}}, "eval_loss", None),
        ({"xla_flags": None}, {"xla_flags": "--xla_x"}, "tokens_per_s", "XLA_FLAGS"),
        ({"allocator": {"preallocates": True}}, {"allocator": {"preallocates": False}}, "amu_gb", "allocator"),
        (
            {"devices": {**made.H100, "power_limit_w": [700]}},
            {"devices": {**made.H100, "power_limit_w": [300]}},
            "al_s",
            "power limit",
        ),
        ({"host": {"power_source": "mains"}}, {"host": {"power_source": "battery"}}, "al_s", "source of power"),
    ],
)
def test_content_and_conditions_decide_and_not_names(tmp_path, a, b, metric, message):
    for name, mixer, told in (("a", "gqa", a), ("b", "mla", b)):
        made.row(tmp_path / name, mixer, told=told, **{metric: 2.0})
    (group,) = groups(tmp_path)
    reason = group.refusal(group.variants[1], metric)
    assert reason is None if message is None else message in reason


def test_a_path_whose_files_have_changed_is_no_replicate(tmp_path):
    for seed, print_ in ((0, "a"), (1, "b")):
        for mixer in ("gqa", "mla"):
            told = {"data": {**DATA, "fingerprint": print_ * 64}}
            made.row(tmp_path / f"{mixer}{seed}", mixer, seed=seed, told=told, al_s=0.5)
    (group,) = groups(tmp_path)
    assert "the baseline's rows are not alike: another data" in group.refusal(group.variants[1], "al_s")


def test_a_row_of_longer_training_is_marked_and_neither_scored_nor_non_dominated(tmp_path):
    for seed in range(2):
        made.row(tmp_path / f"a{seed}", "gqa", seed=seed, al_s=0.5, eval_loss=6.5 + seed / 100)
        made.row(tmp_path / f"m{seed}", "mla", seed=seed, al_s=0.6, eval_loss=6.4 + seed / 100)
        longer = {"train.steps": 200}
        made.row(tmp_path / f"b{seed}", "mqa", seed=seed, changes=longer, al_s=0.1, eval_loss=2.0 + seed / 100)
    board = leaderboard.build_leaderboard(
        rows.read_rows(find_rows.find_files([tmp_path])[0]), baseline="model.mixer=gqa"
    )
    (group,) = board["groups"]
    assert group["baseline"].startswith("model.mixer=gqa")
    (longer,) = [v for v in group["variants"] if "mqa" in v["variant"]]
    for key in ("al_s", "eval_loss"):
        cell = longer["cells"][key]
        assert "rank" not in cell and "ratio" not in cell and "number of tokens" in cell["reason"]
        assert longer["variant"] not in group["pareto"]["al_s|eval_loss"]
    assert longer["efficiency_score"] is None and longer["normalised"]["al_s"] is None
    text = markdown.markdown_report(board, {})
    assert "(not compared)" in text and "another number of tokens than the baseline's: 204800, not 102400" in text


def conditions_of(starved):
    conditions_row = conditions.row(None)
    return conditions_row | {"starved": starved, "reasons": ["84% of the CPU time went to others"] if starved else []}


def test_starved_rows_are_compared_in_time_within_blocks_only_and_marked(tmp_path):
    for seed in range(2):
        for mixer in ("gqa", "mla"):
            values = {"al_s": 0.5 + seed / 100, "tokens_per_s": 100.0, "amu_gb": 1.0}
            met = conditions_of(starved=mixer == "mla" and seed == 1)
            made.row(tmp_path / "runs" / f"{mixer}{seed}", mixer, seed=seed, conditions=met, **values)
            told = {"name": "x", "variant": mixer, "baseline": "gqa", "block": seed, "order": 0, "seed": seed}
            made.row(tmp_path / "sweep" / f"{mixer}{seed}", mixer, seed=seed, sweep=told, conditions=met, **values)
    (group,) = groups(tmp_path / "runs")
    for key in ("al_s", "tokens_per_s"):
        assert "seed 1 alone: 84%" in group.refusal(group.variants[1], key)
    assert group.refusal(group.variants[1], "amu_gb") is None
    (group,) = groups(tmp_path / "sweep")
    cells, _ = group.compare("al_s", "lower")
    assert "ratio" in cells["mla"] and cells["mla"]["starved"] == 1 and "starved" not in cells["gqa"]
    made_board = leaderboard.build_leaderboard(rows.read_rows(find_rows.find_files([tmp_path / "sweep"])[0]))
    (mla,) = [v for v in made_board["groups"][0]["variants"] if v["variant"] == "mla"]
    assert any("x 1: starved" in note for note in mla["notes"])
    assert "(starved)" in markdown.markdown_report(made_board, {})


def test_a_verdict_within_the_noise_floor_is_withheld_and_ties_in_rank(tmp_path):
    """A technique 20 % faster in every block, where the baseline differs from itself by a half."""
    for block, second in enumerate((0.5, 1.6, 0.7, 1.3)):
        for order, (mixer, al_s) in enumerate((("gqa", 1.0), ("mqa", 0.8 * second**0.5), ("gqa", second))):
            told = {"name": "x", "variant": mixer, "baseline": "gqa", "block": block, "order": order, "seed": block}
            jitter = 1 + block / 1000
            made.row(tmp_path / f"{block}{order}", mixer, seed=block, sweep=told, al_s=al_s * jitter, amu_gb=jitter)
    (group,) = groups(tmp_path)
    cells, wins = group.compare("al_s", "lower")
    assert cells["mqa"]["high"] < 1, "by its own interval it would be better"
    assert cells["mqa"]["verdict"].startswith("withheld") and cells["mqa"]["rank"] == cells["gqa"]["rank"] == 1.5
    assert wins["mqa"]["gqa"] == pytest.approx(0.5, abs=0.01)
    assert group.withheld("al_s", group.between("al_s", "mqa", "gqa")[0])
    assert group.compare("amu_gb", "lower")[0]["mqa"]["verdict"].startswith("equal"), "of memory there is no noise"


def test_a_run_that_crashed_before_it_knew_its_device_stays_with_its_sweep(tmp_path):
    made.sweep(tmp_path / "sweep", blocks=2)
    told = {"name": "attention", "variant": "nsa", "baseline": "gqa", "block": 0, "order": 9, "seed": 0}
    made.row(tmp_path / "sweep" / "crash", "nsa", outcome="crash", sweep=told, devices={})
    made.row(tmp_path / "alone", "nsa", outcome="crash", devices={})
    board = leaderboard.build_leaderboard(rows.read_rows(find_rows.find_files([tmp_path])[0]))
    (group,) = board["groups"]
    assert "unknown" not in group["name"] and len(board["failures"]) == 2
    (nsa,) = [v for v in group["variants"] if v["variant"] == "nsa"]
    assert nsa["outcomes"] == {"crash": 1}


def test_a_failed_run_that_started_first_is_no_baseline(tmp_path):
    made.row(tmp_path / "a", "mla", seed=0, outcome="oom")
    made.row(tmp_path / "b", "gqa", seed=1, al_s=0.5)
    (group,) = groups(tmp_path)
    assert group.baseline == "model.mixer=gqa"


def test_a_baseline_by_keys_is_found_where_other_configs_lie_in_the_folder(tmp_path):
    for seed in range(2):
        for mixer in ("gqa", "mla"):
            made.row(tmp_path / f"{mixer}{seed}", mixer, seed=seed, al_s=0.5)
    made.row(tmp_path / "other", "gqa", changes={"model.size": "small", "train.steps": 7}, al_s=0.5)
    (group,) = groups(tmp_path, baseline="model.mixer=gqa")
    assert len(group.of(group.baseline)) == 2 and group.of(group.baseline)[0].config["model.size"] == "tiny"
    (group,) = groups(tmp_path, baseline="model.mixer=gqa, model.size=small")
    assert group.of(group.baseline)[0].config["model.size"] == "small"


def in_sweep(folder, block, mixer, al_s, order=0, starved=False, host="h", **told):
    place = {"name": "x", "variant": mixer, "baseline": "gqa", "block": block, "order": order, "seed": block, **told}
    provenance = {"host": {"name_hash": host, "processor": {"name": "Test", "cores": 2}}, "run": str(folder)}
    met = conditions_of(starved)
    return made.row(folder, mixer, seed=block, sweep=place, told=provenance, conditions=met, al_s=al_s)


@pytest.mark.parametrize(
    ("second", "told", "compared"), [("h", {}, True), ("other", {}, False), ("h", {"search": "--config.x=1"}, False)]
)
def test_blocks_excuse_starving_on_one_machine_and_where_they_are_random(tmp_path, second, told, compared):
    for block in range(2):
        in_sweep(tmp_path / f"a{block}", block, "gqa", 0.5, **told)
        in_sweep(tmp_path / f"b{block}", block, "mla", 0.6, 1, starved=True, host=second, **told)
    (group,) = groups(tmp_path)
    assert (group.refusal("mla", "al_s") is None) is compared


def test_two_sweeps_of_one_name_do_not_share_blocks(tmp_path):
    """Run again after a week, with all twice as slow: pairs are of one sweep, not of its mean with the other."""
    for week, slow in ((0, 1.0), (1, 2.0)):
        for block in range(2):
            for order, (mixer, al_s) in enumerate((("gqa", 0.5), ("mla", 0.6))):
                in_sweep(tmp_path / f"week{week}" / f"{block}{order}", block, mixer, al_s * slow, order)
    (group,) = groups(tmp_path)
    assert len(group.blocks) == 4 and group.between("al_s", "mla", "gqa")[0].high == pytest.approx(1.2)
    (alone,) = groups(tmp_path / "week0")
    assert alone.blocks == ["x 0", "x 1"]


def test_a_technique_is_what_a_config_holds_and_not_its_name(tmp_path):
    made.row(tmp_path / "a", "mla", told={"run": "a"})
    file = made.row(tmp_path / "b", "mha(qkv_bias=True)", changes={"model.ffn": "gelu", "model.residual": "parallel"})
    record = json.loads(file.read_text())
    record["config"]["model"]["norm"] = "layernorm(eps=1e-5)"
    file.write_text(json.dumps(record))
    named = made.row(tmp_path / "c", "mla", seed=3, task="tune", changes={"adapter": "rslora(rank=8)"})
    for path, name in ((tmp_path / "a" / "record.json", "pythia"), (named, "tune-full")):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"name": name}))
    names_by_row = [techniques.techniques(row) for row in rows.read_rows(find_rows.find_files([tmp_path])[0])]
    assert [used["attention"] for used in names_by_row] == ["mla", "pythia", "mla"] and names_by_row[2][
        "tuning"
    ] == "rslora"


def test_a_resumed_run_says_whose_times_it_has(tmp_path):
    made.row(tmp_path, told={"resumed_from_step": 50}, al_s=0.5)
    (row,) = rows.read_rows(find_rows.find_files([tmp_path])[0])
    assert "resumed from step 50" in row.notes()[0]


def test_many_variants_are_ranked_without_setting_every_two_beside_each_other(tmp_path):
    for i in range(ranking.MANY + 1):
        for seed in (0, 1):
            changes = {"model.ffn": f"swiglu(hidden={i + 1})"}
            made.row(tmp_path / f"{i}-{seed}", seed=seed, changes=changes, al_s=1.0 + i / 9 + seed / 99, eval_loss=3.0)
    (group,) = leaderboard.build_leaderboard(rows.read_rows(find_rows.find_files([tmp_path])[0]))["groups"]
    ranks = [variant["cells"]["al_s"]["rank"] for variant in group["variants"]]
    assert sorted(ranks) == list(range(1, ranking.MANY + 2))
    assert group["wins"] == {} and group["pareto"] == {}


def test_ranks_by_sorting_are_ranks_by_pairs():
    x_RV = np.random.default_rng(0).normal(size=(20, ranking.MANY + 9)).round(1)
    for better in ("higher", "lower"):
        for floor in (0.0, 0.25):
            many = ranking._ranks(x_RV, better, floor)
            signed_RV = -x_RV if better == "higher" else x_RV
            apart_RVV = signed_RV[:, :, None] - signed_RV[:, None, :]
            pairs = 1 + (apart_RVV > floor).sum(-1) + ((abs(apart_RVV) <= floor).sum(-1) - 1) / 2
            np.testing.assert_array_equal(many, pairs)


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"model.ffn": "moe(num_experts=4)"}, "moe"),
        ({"model.ffn": "smoelu()"}, "dense"),
        ({"model.pattern": ["gqa", "mqa | moe(num_experts=4, top_k=1)"]}, "moe"),
        ({"model.ffn": "moe()", "model.pattern": ["gqa", "mqa | swiglu"]}, "moe"),
        ({"model.ffn": "moe()", "model.pattern": ["mqa | swiglu"]}, "dense"),
    ],
)
def test_a_mixture_is_told_by_the_ffns_of_its_blocks(changes, name, tmp_path):
    made.row(tmp_path, changes=changes)
    (row,) = rows.read_rows(find_rows.find_files([tmp_path])[0])
    assert techniques.techniques(row)["ffn"] == name


def test_costs_at_another_price_are_shown_and_not_ranked(tmp_path):
    for name, price in (("gqa", 2.0), ("mqa", 2.0), ("mla", 3.0)):
        made.row(tmp_path / name, name, changes={"metrics.price": price}, usd_per_run=price, al_s=0.5)
    (group,) = groups(tmp_path, baseline="model.mixer=gqa")
    cells, _ = group.compare("usd_per_run", "lower")
    refused = cells["model.mixer=mla"]
    assert refused["mean"] == 3.0 and "another price" in refused["reason"] and "ratio" not in refused
    assert cells["model.mixer=mqa"]["ratio"] == 1
    assert group.compare("al_s", "lower")[0]["model.mixer=mla"]["ratio"] == 1
