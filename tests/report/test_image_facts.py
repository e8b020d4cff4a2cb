"""Rows of pictures: what must be equal before they share a ranking or a comparison."""

import pytest

from efficientllm.errors import UserError
from efficientllm.report import claims, columns, find_rows, groups, leaderboard, regression, rows, techniques
from report import made

pytestmark = pytest.mark.quick


def read(folder):
    return rows.read_rows(find_rows.find_files([folder])[0])


def grouped(folder):
    return groups.group_rows(read(folder))


OTHER_GROUPS = {
    "text": {"model.embed": "tokens", "objective": "next_token()"},
    "ddpm": {"objective": "ddpm(steps=100)"},
    "latents": {"autoencoder": "kl(path='vae')"},
    "batch": {"train.batch_size": 16},
}


@pytest.mark.parametrize("changes", OTHER_GROUPS.values(), ids=OTHER_GROUPS)
def test_these_never_share_a_ranking(tmp_path, changes):
    made.image_row(tmp_path / "a")
    made.image_row(tmp_path / "b", changes=changes)
    assert len(grouped(tmp_path)) == 2


def test_pictures_of_another_size_never_share_a_ranking(tmp_path):
    made.image_row(tmp_path / "a")
    made.image_row(tmp_path / "b", told={"data": made.GLYPHS | {"size": 64}})
    made.image_row(tmp_path / "c", told={"data": {}}, changes={"data": "glyphs(size=64)"})
    made.image_row(tmp_path / "d", changes={"infer.size": (64, 96)})
    first, second, third = grouped(tmp_path)
    assert first.batch == "8 pictures of 32 px a step, flow of pixels" and len(second.rows) == 2
    assert third.batch == "8 pictures of 64 x 96 px a step, flow of pixels"


@pytest.mark.parametrize(
    ("changes", "told", "metric", "message"),
    [
        ({"objective": "flow(shift=3.0)"}, {}, "eval_loss", None),
        ({"objective": "flow(shift=3.0)"}, {}, "eval_loss_level_3", None),
        ({"objective": "flow(shift=3.0)"}, {}, "loss", "another objective"),
        ({"objective": "flow(shift=3.0)"}, {}, "al_s", None),
        ({}, {"data": made.GLYPHS | {"fingerprint": "0" * 64}}, "eval_loss", "another data"),
        ({"train.steps": 50}, {}, "eval_loss_level_3", "another number of pictures"),
        ({"train.length": 64}, {}, "eval_loss", None),
        ({"tokenizer": "words"}, {}, "eval_loss", None),
        ({"eval.batches": 4}, {}, "eval_vlb", "number of held-out batches"),
        ({"infer.guidance": 4.0}, {}, "fd_own", "another infer.guidance"),
        ({"infer.guidance": 4.0}, {}, "eval_loss", None),
        ({}, {"samples": {"sha256": "b", "count": 256}}, "fd_own", "another extractor of features"),
        ({}, {"samples": {"sha256": "a", "count": 64}}, "fd_own", "another number of samples"),
    ],
)
def test_a_metric_is_compared_where_what_it_depends_on_is_equal(tmp_path, changes, told, metric, message):
    drawn = {"samples": {"sha256": "a", "count": 256}}
    guided = {"infer.guidance": 1.0, "eval.batches": 2}
    made.image_row(tmp_path / "a", changes=guided, told=drawn, **{metric: 2.0})
    made.image_row(tmp_path / "b", "gqa", changes=guided | changes, told=drawn | told, **{metric: 2.0})
    (group,) = grouped(tmp_path)
    reason = group.refusal(group.variants[1], metric)
    assert reason is None if message is None else message in reason


def test_other_schedules_of_ddpm_measure_other_losses(tmp_path):
    for name, objective in (("a", "ddpm()"), ("b", "ddpm(label_dropout=0.2)"), ("c", "ddpm(steps=100)")):
        made.image_row(tmp_path / name, name, changes={"objective": objective})
    (group,) = grouped(tmp_path)
    reasons = [group.refusal(variant, "eval_loss") for variant in group.variants]
    assert reasons[:2] == [None, None] and "another objective" in reasons[2]


def test_a_regression_check_of_text_against_pictures_is_refused(tmp_path):
    made.image_row(tmp_path / "a")
    made.row(tmp_path / "b", "mha", eval_loss=1.0)
    with pytest.raises(UserError, match="effective batch"):
        regression.compare_runs(read(tmp_path / "a"), read(tmp_path / "b"))


def test_columns_of_pictures_have_directions_and_units(tmp_path):
    values = {
        "images_per_s": 50.0,
        "flops_per_image": 1e9,
        "eval_loss_level_1": 1.0,
        "fd_own": 3.0,
        "fd_own_floor": 0.5,
    }
    made.image_row(tmp_path / "a", **values)
    shown = {column.key: column for column in columns.list_columns(read(tmp_path))}
    better = {key: shown[key].better for key in values}
    assert better == {
        "images_per_s": "higher",
        "flops_per_image": "lower",
        "eval_loss_level_1": "lower",
        "fd_own": "lower",
        "fd_own_floor": None,
    }
    assert shown["eval_loss"].unit == shown["perplexity"].unit == "1"
    assert columns.is_exact("flops_per_image") and columns.is_timed("images_per_s") and columns.is_energy("j_per_image")
    made.row(tmp_path / "b", "mha", eval_loss=1.0)
    assert {column.key: column.unit for column in columns.list_columns(read(tmp_path))}["eval_loss"] == "1"


def test_claims_of_text_are_not_tested_on_pictures_and_those_of_dit_are(tmp_path):
    for seed in range(3):
        for mixer, loss, seconds in (("mha", 1.0, 0.2), ("mqa", 0.9, 0.1), ("nsa", 1.1, 0.5)):
            noise = 1 + seed / 1000
            made.image_row(tmp_path / f"{mixer}{seed}", mixer, seed, eval_loss=loss * noise, al_s=seconds * noise)
    evaluated = {claim["name"]: claim for claim in claims.evaluate_claims(grouped(tmp_path))}
    assert evaluated["dit-loss"]["status"] == claims.HOLDS and len(evaluated["dit-loss"]["pairs"]) == 1
    assert (
        evaluated["dit-nsa-latency"]["status"] == claims.HOLDS and evaluated["dit-nsa-loss"]["status"] == claims.HOLDS
    )
    assert evaluated["mqa-latency"]["reason"] == "it speaks of models of text" and not evaluated["mqa-latency"]["pairs"]
    made.sweep(tmp_path / "text", blocks=3)
    evaluated = {claim["name"]: claim for claim in claims.evaluate_claims(grouped(tmp_path))}
    assert {pair["group"].split(" · ")[0] for pair in evaluated["mqa-latency"]["pairs"]} == {"attention"}
    assert len(evaluated["dit-loss"]["pairs"]) == 1


def test_the_studys_rows_of_dit_stand_beside_those_of_pictures(tmp_path):
    for seed in range(3):
        noise = 1 + seed / 1000
        made.image_row(tmp_path / f"mha{seed}", seed=seed, al_s=0.2 * noise)
        mixture = {"model.ffn": "moe(num_experts=8, top_k=2)"}
        made.image_row(tmp_path / f"moe{seed}", seed=seed, al_s=0.1 * noise, changes=mixture)
    board = leaderboard.build_leaderboard(read(tmp_path))
    (entry,) = board["groups"][0]["study"]
    compared = {row["metric"]: row for row in entry["rows"]}
    assert entry["table"] == "dit-xl-2_attention" and compared["al_s"]["agrees"] == "same side"
    assert compared["al_s"]["study_ratio"] == pytest.approx(0.234 / 0.2873)
    assert {techniques.study_axis(row) for row in read(tmp_path)} == {"images"}
