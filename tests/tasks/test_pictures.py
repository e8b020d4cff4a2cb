"""Runs that learn from pictures: their rows and samples, a mesh, a stop and its resumption, and what is refused."""

import os
import signal
import threading

import numpy as np
import pytest

import runs
from autoencoders import folders
from efficientllm import main
from efficientllm.data.images import latents
from efficientllm.record.row import read_record

STEPS = 40
SIZE = "tiny(num_layers=2, dim=32, num_heads=2, num_kv_heads=1, head_dim=16, hidden=64)"


def arguments(workdir, **overrides):
    """A run of `STEPS` steps on letters of 16 x 16 pixels."""
    values = {
        "model.size": SIZE,
        "model.embed": "patches(patch=4)",
        "data": "glyphs(size=16, channels=1, letters='abcd', held_out=0.2)",
        "train.steps": STEPS,
        "train.batch_size": 8,
        "train.log_every": 1,
        "train.ema": 0.5,
        "eval.every": 20,
        "checkpoint.every": 20,
        "sample.images": 4,
        "infer.solver": "euler(steps=2)",
        **{key.replace("__", "."): value for key, value in overrides.items()},
    }
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    return [f"--config={runs.ROOT}/configs/dit.py", f"--workdir={workdir}", *flags]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("pictures") / "whole"
    assert main.main(arguments(workdir)) == 0
    return workdir


def test_the_row_counts_images(tmp_path):
    # No checkpoint before the end: steps beside the writing of one are not measured, and these are few and short.
    assert main.main(arguments(tmp_path / "run", eval__every=0, checkpoint__every=0)) == 0
    row = read_record(tmp_path / "run" / "record.json")
    physical, losses = row["physical"], row["quality"]
    assert row["outcome"] == "ok" and row["sources"]["tt_tokens_per_param_s"]["source"].startswith("images (Eq. 4)")
    rate = physical["images_per_s"] / physical["params_active"]
    assert row["paper"]["tt_tokens_per_param_s"] == pytest.approx(rate)
    assert physical["tokens_per_s"] == pytest.approx(16 * physical["images_per_s"])
    assert physical["flops_per_image"] == pytest.approx(16 * physical["flops_per_token"])
    levels = [losses[f"eval_loss_level_{k}"] for k in range(1, 8)]
    assert losses["eval_loss"] == pytest.approx(np.mean(levels))


def test_samples_are_pictures_in_the_folder_and_in_tensorboard(whole):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Image.open(whole / "samples" / "grid.png") as grid:
        assert grid.size == (2 * 16 + 2, 2 * 16 + 2)
    events = EventAccumulator(str(whole), size_guidance={"tensors": 0})
    events.Reload()
    (event,) = events.Tensors("samples")
    width, height, png = event.tensor_proto.string_val
    assert (width, height) == (b"34", b"34") and png == (whole / "samples" / "grid.png").read_bytes()


@pytest.mark.slow
def test_eight_devices_learn_what_one_learns(whole, tmp_path):
    status, output = runs.finish(runs.start(arguments(tmp_path / "one")))
    assert status == 0, output
    alone, eight = (read_record(path / "record.json")["quality"] for path in (tmp_path / "one", whole))
    assert alone["eval_loss"] == pytest.approx(eight["eval_loss"], rel=1e-5)


@pytest.mark.slow
def test_stopped_and_resumed_it_has_the_same_losses(whole, tmp_path):
    workdir = tmp_path / "run"
    signum, argv = signal.SIGTERM, arguments(workdir)
    sender = threading.Thread(target=runs.when, args=(workdir, "step  2/40", lambda: os.kill(os.getpid(), signum)))
    sender.start()
    assert main.main(argv) == 128 + signum
    sender.join()
    assert main.main(argv) == 0
    assert runs.losses(workdir) == runs.losses(whole)
    assert read_record(workdir / "record.json")["quality"] == read_record(whole / "record.json")["quality"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model.embed": "patches(patch=5)"}, "size = 16: is no multiple of the 5 pixels of a token"),
        ({"model.embed": "patches(channels=4)"}, "channels = 4"),
        ({"model.embed": "patches(classes=2)"}, "classes = 2"),
        ({"model.embed": "tokens"}, "config.model.embed"),
        ({"objective": "next_token()"}, "text is needed"),
        ({"objective": "ddpm()"}, "learned_sigma"),
        ({"data": "text(path='*.py')"}, "images are needed"),
        ({"data": "images(path='empty', size=16)"}, "empty"),
        ({"infer.solver": "ddim(steps=2)"}, "config.infer.solver"),
        ({"infer.guidance_channels": 2}, "guidance_channels = 2"),
        ({"model.mixer": "rwkv(head_dim=16)"}, "rwkv"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_line(change, message, tmp_path, capsys):
    assert main.main(arguments(tmp_path / "run", **change)) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1, error
    assert not (tmp_path / "run" / "record.json").exists()


@pytest.mark.slow
def test_latents_are_learnt_and_decoded(tmp_path):
    from PIL import Image

    folder = folders.save(tmp_path / "vae")  # halves a side; 3 channels to 4
    options = {
        "autoencoder": f"kl(path='{folder}')",
        "data": "glyphs(size=16, letters='abcd', held_out=0.2)",
        "model.embed": "patches(patch=2)",
    }
    assert main.main(arguments(tmp_path / "run", **options)) == 0
    row = read_record(tmp_path / "run" / "record.json")
    assert row["provenance"]["data"]["latents_of"].startswith("kl ") and row["quality"]["eval_loss"] > 0
    with Image.open(tmp_path / "run" / "samples" / "grid.png") as grid:
        assert grid.size == (2 * 16 + 2, 2 * 16 + 2) and grid.mode == "RGB"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model.embed": "patches(channels=3)"}, "channels = 3"),
        ({"data": "glyphs(size=17)"}, "size = 17"),
        ({"data": "glyphs(size=16, channels=1)"}, "takes 3"),
        ({"autoencoder": "kl(path='nowhere')"}, "config.autoencoder = "),
    ],
    ids=str,
)
def test_an_autoencoder_that_does_not_fit_is_one_line(change, message, tmp_path, capsys, monkeypatch):
    """Before a picture is encoded."""
    monkeypatch.setattr(latents, "load_latents", None)
    folder = folders.save(tmp_path / "vae")
    options = {"autoencoder": f"kl(path='{folder}')", "data": "glyphs(size=16)"} | change
    assert main.main(arguments(tmp_path / "run", **options)) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1, error
