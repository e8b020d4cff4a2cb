"""Samples at the end of a run on pictures: the grid, the nearest training pictures, and what the row says of them."""

import io
import json

import numpy as np
import pytest
from PIL import Image

import runs
from efficientllm import main
from efficientllm.config.plain import plain
from efficientllm.data.images import ImageData
from efficientllm.evaluation import own_features, sample_quality
from efficientllm.infer.pictures import image_grid
from efficientllm.record import run_files
from record.test_tensorboard import pictures

pytestmark = pytest.mark.xdist_group("samples")  # they share one run
GLYPHS = "glyphs(size=8, letters='OITLXC', held_out=0.1)"
SIDE = 8
PICTURES = {
    "data": GLYPHS,
    "objective": "flow()",
    "model.embed": "patches(patch=4)",
    "model.mixer": "mha",
    "model.ffn": "gelu",
    "model.modulation": "linear",
    "model.norm": "layernorm",
    "model.position": "sincos2d",
    "train.steps": 4,
    "train.ema": 0.5,
    "sample.images": 6,
    "infer.solver": "euler(steps=3)",
    "infer.guidance": 2.0,
}


def arguments(folder, workdir, **overrides):
    return runs.arguments(folder, workdir, **PICTURES | {key.replace("__", "."): v for key, v in overrides.items()})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("samples") / "run"
    with pytest.MonkeyPatch.context() as patch:
        train = own_features.train
        patch.setattr(own_features, "train", lambda *data: train(*data, steps=4))
        assert main.main(arguments(workdir.parent, workdir, quality__fd=66)) == 0
    return workdir


def row(workdir):
    return json.loads((workdir / "record.json").read_text())


@pytest.mark.slow
def test_the_row_holds_the_distance_its_floor_and_what_they_depend_on(run):
    record = row(run)
    assert all(record["quality"][key] >= 0 for key in sample_quality.KEYS if not key.startswith("kd_"))
    drawn = record["provenance"]["samples"]
    assert (
        drawn["count"] == 66 and drawn["how"] == "euler(steps=3) in 3 steps, guidance 2" and len(drawn["sha256"]) == 64
    )
    assert "fid" not in json.dumps(record["quality"])
    assert record["config"]["quality"]["fd"] == 66


@pytest.mark.slow
def test_the_grid_lies_beside_the_nearest_training_pictures(run):
    described = json.loads((run / "samples" / "samples.json").read_text())
    assert (described["count"], described["columns"], described["height"], described["border"]) == (6, 3, SIDE, 2)
    assert described["labels"] == [0, 1, 2, 3, 4, 5] and described["classes"] == list("OITLXC")
    grid, nearest = (np.asarray(Image.open(run / "samples" / f"{name}.png")) for name in ("grid", "nearest"))
    assert grid.shape == nearest.shape == (2 * (SIDE + 2) - 2, 3 * (SIDE + 2) - 2, 3)
    data = ImageData(GLYPHS)
    places = [(row * (SIDE + 2), column * (SIDE + 2)) for row in range(2) for column in range(3)]
    shown = [nearest[top : top + SIDE, left : left + SIDE] for top, left in places]
    samples = np.stack([grid[top : top + SIDE, left : left + SIDE] for top, left in places]).astype(float)
    training = np.stack([data.pictures[int(index)] for index in data.indices("train")])
    distances = np.sqrt(np.mean((samples[:, None] - training[None]) ** 2, (2, 3, 4)))
    assert described["nearest"]["distances"] == pytest.approx(distances.min(1), abs=1e-3)
    assert np.array_equal(np.stack(shown), training[distances.argmin(1)])
    assert described["nearest"]["of"] == len(training) and described["nearest"]["unseen"] > 0
    assert np.array_equal(nearest, image_grid(np.stack(shown)))


@pytest.mark.slow
def test_tensorboard_reads_the_grid(run):
    ((step, png),) = pictures(run.parent, "run", "samples")
    assert step == 4 and png == (run / "samples" / "grid.png").read_bytes()
    assert Image.open(io.BytesIO(png)).size == (3 * (SIDE + 2) - 2, 2 * (SIDE + 2) - 2)


@pytest.mark.slow
def test_a_run_that_judges_no_samples_draws_the_same_grid(run, tmp_path):
    argv = arguments(tmp_path, tmp_path / "run", quality__fd=0)
    assert main.main(argv) == 0
    grids = [(folder / "samples" / "grid.png").read_bytes() for folder in (run, tmp_path / "run")]
    assert grids[0] == grids[1], "judging samples changes none"
    record = row(tmp_path / "run")
    assert "fd_own" not in record["quality"] and "samples" not in record["provenance"]
    assert "fd" not in record["config"]["quality"]


def test_overwriting_removes_every_picture(tmp_path):
    names = ("picture.json", *(f"samples/{name}" for name in ("grid.png", "nearest.png", "samples.json", "007.png")))
    (tmp_path / "samples").mkdir()
    for name in (*names, "samples/mine.png"):
        (tmp_path / name).write_bytes(b"old")
    assert run_files.remove(tmp_path) == ["samples"]
    assert [file.name for file in (tmp_path / "samples").iterdir()] == ["mine.png"]


TEXT = {
    **{"model__embed": "tokens", "objective": "next_token()", "data": f"text(path='{runs.ROOT}/README.md')"},
    **{"model__modulation": "plain", "model__position": "rope"},
}
BAD = {
    "one": ({"quality__fd": 1}, "config.quality.fd = 1: a distance of so few"),
    "negative": ({"quality__fd": -1}, "config.quality.fd = -1"),
    "text": (
        TEXT | {"quality__fd": 66},
        "config.quality.fd = 66: counts pictures",
    ),
    "solver": ({"infer__solver": "ddim(steps=5)"}, "config.infer.solver"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_sampled_is_refused_before_the_run(changes, message, tmp_path, capsys):
    assert main.main(arguments(tmp_path, tmp_path / "run", **changes)) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run" / "record.json").exists()


def test_the_key_is_left_out_of_configs_at_its_default():
    config, _ = main.parse([f"--config={runs.ROOT / 'configs/base.py'}"])[:2]
    assert "fd" not in plain(config)["quality"]
