"""The study's claims on rows where the answer is known."""

import json

import pytest

from efficientllm.report import (
    claim_figures,
    claims,
    columns,
    find_rows,
    groups,
    leaderboard,
    markdown,
    planned_claims,
    rows,
    study_tables,
)
from efficientllm.report.statistics import Interval
from report import made


def evaluate(folder):
    evaluated = claims.evaluate_claims(groups.group_rows(rows.read_rows(find_rows.find_files([folder])[0])))
    return {claim["name"]: claim for claim in evaluated}


def test_claims_hold_fail_and_stay_open(tmp_path):
    claims_by_name = evaluate(made.sweep(tmp_path, blocks=6))
    assert claims_by_name["mqa-latency"]["status"] == claims.HOLDS and len(claims_by_name["mqa-latency"]["pairs"]) == 2
    assert claims_by_name["mla-perplexity"]["status"] == claims.HOLDS
    assert (claims_by_name["moe-memory"]["status"], claims_by_name["moe-memory"]["reason"]) == (
        claims.OPEN,
        "no row with ffn moe",
    )
    nulls = claims_by_name["mqa-memory"], claims_by_name["nsa-power"]
    assert nulls[0]["status"] == claims.HOLDS and nulls[1]["reason"] == "no row with attention nsa"


def test_a_claim_that_is_wrong_here_does_not_hold(tmp_path):
    worse = {"gqa": (1.0, 1.0, 1.0), "mqa": (1.2, 1.0, 1.0), "mla": (0.9, 1.0, 1.0)}
    claims_by_name = evaluate(made.sweep(tmp_path, blocks=6, techniques=worse))
    assert claims_by_name["mqa-latency"]["status"] == claims.FAILS
    assert claims_by_name["mqa-memory"]["status"] == claims.FAILS, "equal within 2 % is not less"


def test_moe_is_compared_with_dense_only_where_nothing_else_differs(tmp_path):
    for seed in range(3):
        made.row(tmp_path / f"d{seed}", seed=seed, amu_gb=1.0 + seed / 1e3)
        made.row(tmp_path / f"m{seed}", seed=seed, amu_gb=1.7 + seed / 1e4, changes={"model.ffn": "moe(num_experts=8)"})
        made.row(tmp_path / f"x{seed}", "mla", seed=seed, amu_gb=1.0)
    claim = evaluate(tmp_path)["moe-memory"]
    assert claim["status"] == claims.FAILS and len(claim["pairs"]) == 1
    assert claim["pairs"][0]["ratio"] == pytest.approx(1.7, abs=0.01)


def test_a_claim_of_a_scale_or_device_is_not_tested_elsewhere(tmp_path):
    for name in ("lora", "rslora"):
        made.row(tmp_path / name, task="tune", changes={"adapter": f"{name}(rank=8)"}, loss=1.0, params_total=1e9)
    claims_by_name = evaluate(tmp_path)
    assert "at least 1.35e+10; here it is 1e+09" in claims_by_name["rslora-large"]["reason"]
    assert claims_by_name["rslora-small"]["pairs"][0]["reason"] == "one block: no interval"


@pytest.mark.parametrize(
    ("low", "high", "bound", "status"),
    [
        (0.8, 0.9, "< 1", claims.HOLDS),
        (1.1, 1.2, "< 1", claims.FAILS),
        (0.9, 1.1, "< 1", claims.OPEN),
        (0.99, 1.01, "< 1", claims.FAILS),
        (0.99, 1.01, ">= 1", claims.HOLDS),
        (1.5, 1.7, "<= 1.4", claims.FAILS),
        (1.3, 1.5, "<= 1.4", claims.OPEN),
        (None, None, "< 1", claims.OPEN),
    ],
)
def test_judgement(low, high, bound, status):
    assert claims.judge_interval(Interval(1.0, low, high, 6, ""), bound)[0] == status


def test_what_is_declared_can_be_evaluated():
    tables = study_tables.read_tables()
    for claim in claims.read_claims():
        assert ("quote" in claim) != ("says" in claim) and claim["where"]
        assert claim["table"] in tables
        assert claim["metric"] == "fid" or columns.column(claim["metric"], "", "").better
        assert claims.judge_interval(Interval(1.0, 1.0, 1.0, 6, ""), claim["ratio"])[0] in (claims.HOLDS, claims.FAILS)
    names = [claim["name"] for claim in claims.read_claims()]
    assert len(set(names)) == len(names)


def plan(folder, gb, flops=1e9, **changes):
    """A plan's row, with what it predicts."""
    file = made.row(folder, task="plan", devices=made.H100, flops_per_token=flops, changes=changes)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"predicted": {"amu_gb": gb}}))


def test_plans_are_judged_apart_and_say_so(tmp_path):
    mixture, adapter = {"model.ffn": "moe(num_experts=8)"}, {"plan.of": "tune", "adapter": "lora(rank=8)"}
    plan(tmp_path / "dense", 40.0)
    plan(tmp_path / "moe", 80.0, 1.1e9, **mixture)
    plan(tmp_path / "mqa", 39.9, **{"model.mixer": "mqa"})
    plan(tmp_path / "lora", 10.0, **adapter)
    plan(tmp_path / "full", 30.0, **adapter | {"adapter": "full()"})
    plan(tmp_path / "remade", 5.0, **mixture | {"model.remat": "full"})
    for seed in range(3):
        made.row(tmp_path / f"measured{seed}", seed=seed, amu_gb=1.0, devices=made.H100)
        made.row(tmp_path / f"mixture{seed}", seed=seed, amu_gb=1.2, devices=made.H100, changes=mixture)
    row_groups = groups.group_rows(rows.read_rows(find_rows.find_files([tmp_path])[0]))
    measured = {claim["name"]: claim for claim in claims.evaluate_claims(row_groups)}
    planned = {claim["name"]: claim for claim in planned_claims.evaluate_plans(row_groups)}
    assert [pair["ratio"] for pair in measured["moe-memory"]["pairs"]] == [pytest.approx(1.2)]
    assert "no row with tuning lora" in measured["lora-memory"]["reason"]
    ratios = [pair.get("ratio") for pair in planned["moe-memory"]["pairs"]]
    assert sorted(ratios, key=str) == [2.0, None] and "differ in model.remat too" in planned["moe-memory"]["reason"]
    assert planned["moe-memory"]["status"] == "does not hold, predicted"
    assert planned["lora-memory"]["pairs"][0]["ratio"] == pytest.approx(1 / 3)
    assert planned["mqa-memory"]["reason"].endswith("equal within ±2 %")
    assert "al_s" not in {claim["metric"] for claim in planned.values()}
    text = markdown.markdown_report(
        leaderboard.build_leaderboard(rows.read_rows(find_rows.find_files([tmp_path])[0])), {}
    )
    sections = ("## The study's claims", "## What plans say", "does not hold, predicted")
    assert sorted(map(text.index, sections)) == [text.index(section) for section in sections]


def test_a_hybrid_is_of_none_of_its_kinds_and_a_model_without_attention_needs_no_position(tmp_path):
    hybrid = {"model.pattern": ["mamba | swiglu", "gqa | swiglu"]}
    free = {"model.position": "none", "model.ffn": "none"}
    for seed in range(3):
        made.row(tmp_path / f"gqa{seed}", seed=seed, amu_gb=1.0)
        made.row(tmp_path / f"hybrid{seed}", seed=seed, amu_gb=0.5, changes=hybrid)
        made.row(tmp_path / f"mqa{seed}", "mqa", seed=seed, amu_gb=0.9)
        made.row(tmp_path / f"mamba{seed}", "mamba", seed=seed, amu_gb=0.8, changes=free)
    claims_by_name = evaluate(tmp_path)
    assert [pair["ratio"] for pair in claims_by_name["mqa-memory"]["pairs"]] == [pytest.approx(0.9)]
    assert claims_by_name["mamba-memory"]["status"] == claims.HOLDS


def test_a_reason_that_many_pairs_share_is_said_once():
    pairs = [{"variant": f"v{i}", "against": "w", "reason": "one block: no interval"} for i in range(9)]
    assert claims.join_reasons(pairs) == "v0 / w, v1 / w, v2 / w, v3 / w and 5 more: one block: no interval"


def test_a_figure_of_many_pairs_draws_those_that_decide():
    ratio = {"ratio": 0.9, "low": 0.8, "high": 1.2, "against": "w"}
    pairs = [ratio | {"variant": f"v{i}", "status": claims.OPEN} for i in range(20)]
    pairs[17]["status"], pairs[19]["status"] = claims.HOLDS, claims.FAILS
    svg = claim_figures.draw_claim({"name": "n", "metric": "al_s", "ratio": "< 1", "pairs": pairs})
    places = [svg.index(f"{name} / w") for name in ("v19", "v17", "v0", "v9")]
    assert places == sorted(places) and "v10 / w" not in svg
