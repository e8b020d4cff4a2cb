"""Quality sweeps and cost sweeps of the same variants: what each supplies to one ranking."""

import pytest

from efficientllm.report import find_rows, groups, leaderboard, markdown, write_files
from report import made

pytestmark = pytest.mark.quick

LOSSES = {"gqa": 2.0, "mqa": 2.2, "mla": 1.9}
TIMES = {"gqa": 0.5, "mqa": 0.4, "mla": 0.7}


def place(name, measures, variant, block, order):
    told = {"name": name, "variant": variant, "baseline": "gqa", "block": block, "order": order, "seed": block}
    return told | {"measures": measures}


def quality_row(out, mixer, seed, machine="A", size=None, **changes):
    processor = {"host": {"processor": {"name": machine, "cores": 2}}, "run": f"{out} quality {mixer} {seed}"}
    told = place("long", "quality", mixer, seed, 0)
    values = {"eval_loss": LOSSES[mixer] + seed / 100, "al_s": 9.0, "amu_gb": 9.0, "flops_per_token": 1e6}
    values |= {"resident_weight_bytes": size}
    changes = {"train.steps": 1000} | changes
    return made.row(out / f"q{mixer}{seed}", mixer, seed, sweep=told, told=processor, changes=changes, **values)


def cost_row(out, mixer, block, **changes):
    told = place("short", "cost", mixer, block, 0)
    values = {"eval_loss": 7.0, "al_s": TIMES[mixer] * (1 + block / 100), "amu_gb": 1.0, "flops_per_token": 1e6}
    provenance = {"run": f"{out} cost {mixer} {block}"}
    changes = {"train.steps": 40} | changes
    return made.row(out / f"c{mixer}{block}", mixer, block, sweep=told, told=provenance, changes=changes, **values)


def board_of(out):
    return leaderboard.build_leaderboard(find_rows.collect_rows([out]).rows)


def cells(group, key):
    return {variant["variant"]: variant["cells"][key] for variant in group["variants"]}


def test_bytes_of_weights_are_those_of_the_sweep_that_has_every_form(tmp_path):
    for mixer in LOSSES:
        quality_row(tmp_path, mixer, 0, size=10.0 * len(mixer))
        if mixer != "mla":
            cost_row(tmp_path, mixer, 0)
    (group,) = board_of(tmp_path)["groups"]
    assert {variant: cell["mean"] for variant, cell in cells(group, "resident_weight_bytes").items()} == dict.fromkeys(
        LOSSES, 30.0
    )
    assert cells(group, "al_s")["mla"]["reason"] == (
        "of a quality sweep, which ran beside other work: no time of it counts"
    )


def test_quality_is_that_of_one_sweep_and_times_are_those_of_the_other(tmp_path):
    for mixer in LOSSES:
        for seed in range(4):  # on two machines
            quality_row(tmp_path, mixer, seed, machine="AB"[seed % 2])
        for block in range(3):
            cost_row(tmp_path, mixer, block)
    board = board_of(tmp_path)
    (group,) = board["groups"]
    assert group["sweep"] == "long + short" and group["baseline"] == "gqa"
    losses, times, memory = (cells(group, key) for key in ("eval_loss", "al_s", "amu_gb"))
    assert losses["mla"]["n"] == losses["mla"]["blocks"] == 4 and times["mla"]["n"] == times["mla"]["blocks"] == 3
    assert losses["mla"]["ratio"] == pytest.approx(0.95, abs=1e-3) and times["mla"]["ratio"] == pytest.approx(1.4)
    assert losses["mla"]["method"] == "t over 4 blocks", "the six blocks of the two sweeps are not six of a metric"
    assert times["mla"]["rank"] == 3 and losses["mla"]["rank"] == 1
    assert memory["mqa"]["mean"] == 1.0 and cells(group, "flops_per_token")["mqa"]["ratio"] == 1.0
    parts = group["parts"]
    assert parts["quality"]["tokens"] == 1000 * 8 * 128 and parts["cost"]["tokens"] == 40 * 8 * 128
    text = markdown.markdown_report(board, {})
    assert "Quality: sweep long, 1,000 steps (1,024,000 tokens), 12 rows in 4 blocks." in text
    assert "Times, energy and memory: sweep short, 40 steps (40,960 tokens), 9 rows in 3 blocks." in text
    (interval, reason) = groups.group_rows(find_rows.collect_rows([tmp_path]).rows)[0].between("al_s", "mla", "mqa")
    assert reason is None and interval.blocks == 3 and interval.ratio == pytest.approx(7 / 4)


def test_a_quality_sweep_alone_has_no_times_and_a_cost_sweep_alone_no_quality(tmp_path):
    for mixer in LOSSES:
        for seed in range(2):
            quality_row(tmp_path / "q", mixer, seed)
            cost_row(tmp_path / "c", mixer, seed)
    (group,) = board_of(tmp_path / "q")["groups"]
    assert group["device"] == "any device"
    cell = cells(group, "al_s")["mla"]
    assert cell["mean"] is None and "ratio" not in cell and "beside other work" in cell["reason"]
    assert cells(group, "eval_loss")["mla"]["ratio"] and cells(group, "amu_gb")["mla"]["mean"] == 9.0
    (group,) = board_of(tmp_path / "c")["groups"]
    cell = cells(group, "eval_loss")["mla"]
    assert cell["mean"] is None and "few steps" in cell["reason"] and cells(group, "al_s")["mla"]["ratio"]


def test_sweeps_of_different_variants_stay_apart(tmp_path):
    for mixer in LOSSES:
        for seed in range(2):
            quality_row(tmp_path, mixer, seed)
            cost_row(tmp_path, mixer, seed, **{"model.size": "small"})
    assert [group["sweep"] for group in board_of(tmp_path)["groups"]] == ["long", "short"]


def test_a_variant_whose_config_differs_is_not_joined(tmp_path):
    for mixer in LOSSES:
        for seed in range(2):
            quality_row(tmp_path, mixer, seed)
            cost_row(tmp_path, mixer, seed, **({"model.ffn": "gelu"} if mixer == "mla" else {}))
    (group,) = board_of(tmp_path)["groups"]
    times = cells(group, "al_s")
    assert times["mqa"]["ratio"] and times["mla"]["mean"] is None
    assert cells(group, "eval_loss")["mla"]["ratio"]


def test_one_quality_sweep_joins_the_costs_of_each_machine(tmp_path):
    for mixer in LOSSES:
        for seed in range(2):
            quality_row(tmp_path, mixer, seed)
            cost_row(tmp_path, mixer, seed)
            on_gpu = place("short", "cost", mixer, seed, 0)
            told, steps = {"run": f"gpu {mixer} {seed}"}, {"train.steps": 40}
            made.row(
                tmp_path / f"g{mixer}{seed}",
                mixer,
                seed,
                sweep=on_gpu,
                told=told,
                devices=made.H100,
                changes=steps,
                al_s=0.1,
            )
    found = board_of(tmp_path)["groups"]
    assert sorted(group["device"] for group in found) == ["1 x NVIDIA H100", "1 x Test, 2 cores"]
    assert all(cells(group, "eval_loss")["mla"]["ratio"] for group in found)


def test_every_line_of_the_csv_says_how_to_run_it_again(tmp_path):
    quality_row(tmp_path, "mla", 3)
    rows = find_rows.collect_rows([tmp_path]).rows
    text = write_files.rows_csv(rows, board_of(tmp_path)["columns"])
    head, line = text.splitlines()
    assert {"measures", "commit", "started", "device", "command"} <= set(head.split(","))
    assert "quality" in line and "--config.model.mixer=mla" in line and "--config.seed=3" in line
