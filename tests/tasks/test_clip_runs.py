"""Runs that learn from clips, by the latents of a video autoencoder: what they see, sample and write."""

import importlib.util
import json

import pytest
from PIL import Image

import runs
from autoencoders import wan_folders
from efficientllm import main
from efficientllm.data.images.clips import read_clip
from efficientllm.record.row import read_record

SIZE = "tiny(num_layers=1, dim=32, num_heads=2, num_kv_heads=1, head_dim=16, hidden=64)"

DATA = "moving_glyphs(frames=5, size=16, letters='AL', held_out=0.2)"


def arguments(workdir, folder, **overrides):
    values = {
        "model.size": SIZE,
        "model.embed": "patches(patch=2)",
        "data": DATA,
        "autoencoder": f"wan(path='{folder}')",
        "train.steps": 4,
        "train.batch_size": 8,
        "eval.batches": 1,
        "sample.images": 3,
        "infer.solver": "euler(steps=2)",
        **{key.replace("__", "."): value for key, value in overrides.items()},
    }
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    return [f"--config={runs.ROOT}/configs/dit.py", f"--workdir={workdir}", *flags]


def test_frames_that_do_not_fit_are_one_line(tmp_path, capsys):
    folder = wan_folders.save(tmp_path / "vae", wan_folders.TINIER)
    data = "moving_glyphs(frames=6, size=16, letters='AL')"
    assert main.main(arguments(tmp_path / "run", folder, data=data)) == 2
    error = capsys.readouterr().err.strip()
    assert "clips of 6 frames: the autoencoder needs 1 more than a multiple of 2; take 5 or 7" in error
    assert len(error.splitlines()) == 1 and "config.data" in error


@pytest.mark.slow
def test_clips_are_learnt_sampled_and_served(tmp_path):
    folder = wan_folders.save(tmp_path / "vae", wan_folders.TINIER)  # halves sides and frames; 3 channels to 4
    assert main.main(arguments(tmp_path / "run", folder)) == 0
    row = read_record(tmp_path / "run" / "record.json")
    assert row["provenance"]["data"]["latents_of"].startswith("wan ") and row["quality"]["eval_loss"] > 0
    samples = tmp_path / "run" / "samples"
    with Image.open(samples / "grid.png") as grid:
        assert grid.size == (5 * 16, 3 * 16 + 2 * 2)
    assert read_clip(samples / "grid.webp").frames.shape == (5, 2 * 16 + 2, 2 * 16 + 2, 3)
    described = json.loads((samples / "samples.json").read_text())
    assert (described["columns"], described["height"], described["width"]) == (1, 16, 5 * 16)
    assert described["classes"][0] in ("A moving right", "L moving right")
    served = {
        "model.pretrained": tmp_path / "run",
        "infer.batch_size": 2,
        "infer.repeats": 1,
        "data": DATA,
    }
    argv = [f"--config={runs.ROOT}/configs/infer_images.py:float32", f"--workdir={tmp_path / 'served'}"]
    values = served | {"sample.images": 2, "infer.solver": "euler(steps=2)", "eval.batches": 1}
    assert main.main([*argv, *(f"--config.{key}={value}" for key, value in values.items())]) == 0
    ending = ".webp" if importlib.util.find_spec("av") is None else ".mp4"
    assert read_clip(tmp_path / "served" / "samples" / f"001{ending}").frames.shape == (5, 16, 16, 3)
