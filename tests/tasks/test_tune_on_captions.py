"""Tuning of a text-to-image pipeline on captions: states of texts in batches, dropped captions, samples."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import runs
from efficientllm import main
from efficientllm.data.images import ImageData
from efficientllm.data.rows import images
from efficientllm.record.row import read_record
from efficientllm.registry import build
from efficientllm.text_states.captions import CaptionStates
from infer import pipelines

pytestmark = pytest.mark.xdist_group("diffusers")
COLOURS = {"a red square": (220, 30, 30), "a green square": (30, 200, 30), "a blue square": (30, 30, 220)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 12 pictures, each with a caption in a file beside it; the spec of the data."""
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    for number, (caption, colour) in enumerate(4 * list(COLOURS.items())):
        pixels = np.clip(np.array(colour) + noise.integers(-20, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return f"images(path={str(folder)!r}, size=16, captions='txt', labels='none', flip=False, held_out=0.3)"


def encoders():
    return build("text_states", "encoders(length=20)").open(str(pipelines.folder("image")))


def run(data, workdir, name="lora", kind="image", **changes):
    values = {
        "model.pretrained": str(pipelines.folder(kind)),
        "text_states": "encoders(length=20)",
        "data": data,
        **{"train.steps": 3, "train.batch_size": 8, "eval.every": 0, "eval.batches": 1, "checkpoint.every": 0},
        **{"sample.images": 2, "infer.solver": "euler(steps=2)", "infer.guidance": 2.0},
    }
    flags = [f"--config.{key}={value}" for key, value in (values | changes).items()]
    return main.main([f"--config={runs.ROOT}/configs/tune_{kind}.py:{name}", f"--workdir={workdir}", *flags])


def test_batches_hold_the_states_of_captions_and_of_the_empty_text(pictures):
    source = encoders()
    data = ImageData(pictures, captions=CaptionStates(source, "encoders(length=20)"), dropout=0.5)
    expected = {text: np.asarray(source.encode([text]).text_BSE[0], np.float32) for text in [*COLOURS, ""]}
    captions = dict(zip(data.pictures.contents & np.uint64(0xFFFFFFFF), data.pictures.captions, strict=True))
    rows = data.train(4, 7)
    dropped = 0
    for start in range(0, 12, 4):
        batch = next(rows)
        for place, (identity, text) in enumerate(zip(batch["identity"], batch["text"], strict=True), start):
            is_dropped = images.is_dropped(7, place, 0.5)
            np.testing.assert_array_equal(text, expected["" if is_dropped else captions[identity]])
            dropped += is_dropped
    assert 0 < dropped < 12 and batch["pooled"].dtype == np.float32
    held_out = next(iter(data.held_out(4)))
    for identity, weight, text in zip(held_out["identity"], held_out["weights"], held_out["text"], strict=True):
        np.testing.assert_array_equal(text, expected[captions[identity]] if weight else 0 * text)


def test_a_share_of_the_captions_is_dropped():
    shares = [np.mean([images.is_dropped(0, place, share) for place in range(4000)]) for share in (0.0, 0.1, 1.0)]
    assert shares[0] == 0 and shares[2] == 1 and abs(shares[1] - 0.1) < 4 * np.sqrt(0.09 / 4000)


@pytest.mark.slow
def test_a_pipeline_is_tuned_and_sampled_beside_its_base(pictures, tmp_path):
    assert run(pictures, tmp_path / "run") == 0
    record = read_record(tmp_path / "run" / "record.json")
    assert np.isfinite(record["quality"]["eval_loss"]) and record["provenance"]["objective"].startswith("flow(")
    assert record["provenance"]["data"]["text_states"] == "encoders(length=20)"
    samples = json.loads((tmp_path / "run" / "samples" / "samples.json").read_text())
    assert set(samples["prompts"]) <= set(COLOURS) and len(samples["prompts"]) == 2
    assert (tmp_path / "run" / "samples" / "base.png").stat().st_size


@pytest.mark.slow
def test_clips_are_tuned_on_their_captions(tmp_path):
    clips = "moving_glyphs(size=16, frames=5, style='^cmr10$', held_out=0.2)"
    values = {"infer.solver": "unipc(steps=2)", "model.precision": "float32", "text_states": "encoders(length=40)"}
    assert run(clips, tmp_path / "run", kind="video", **values) == 0
    samples = json.loads((tmp_path / "run" / "samples" / "samples.json").read_text())
    assert all(prompt.startswith("the ") for prompt in samples["prompts"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"text_states": ""}, "config.text_states = '': the model reads texts; name what encodes captions"),
        ({"text_states": "encoders(path='nowhere', length=20)"}, "nowhere"),
        ({"text_states": "encoders(length=4)"}, "captions: "),
    ],
    ids=["no_states", "no_folder", "too_long"],
)
def test_bad_input_is_one_line(changes, message, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("efficientllm.train.setup.compile_steps", lambda *_: pytest.exit("compiled"))
    pipelines.folder("image")
    capsys.readouterr()  # progress of writing the pipeline
    assert run(changes.pop("data", pictures), tmp_path / "run", **changes) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error


@pytest.mark.parametrize(
    "change, message",
    [
        (pipelines.without("vae"), "config.autoencoder = 'pixels': the model samples latents of 4 channels"),
        (pipelines.without("scheduler"), "scheduler_config.json is missing: model_index.json lists a scheduler"),
        (pipelines.without("tokenizer_3"), "tokenizer_3: is missing"),
        (pipelines.exchange("transformer"), pipelines.OTHER),
        (pipelines.exchange("vae"), "the model samples pictures, and it decodes clips; name the model's own"),
        (pipelines.set_config("vae", latent_channels=8), "its latents have 8 channels, and the model samples 4"),
    ],
    ids=["no_vae", "no_scheduler", "no_tokenizer", "other_transformer", "vae_of_clips", "vae_of_other_channels"],
)
def test_a_pipeline_with_a_part_of_another_is_refused(change, message, pictures, tmp_path, capsys):
    folder = shutil.copytree(pipelines.folder("image"), tmp_path / "pipeline")
    change(folder)
    capsys.readouterr()  # progress of writing the pipelines
    assert run(pictures, tmp_path / "run", **{"model.pretrained": str(folder)}) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error


def test_sizes_and_frames_that_do_not_fit_are_refused(pictures, tmp_path, capsys):
    assert run(pictures.replace("size=16", "size=18"), tmp_path / "run") == 2
    assert "size = 18: is no multiple of the 4 pixels of a token; write 16 or 20" in capsys.readouterr().err
    assert run("moving_glyphs(size=16, frames=4)", tmp_path / "run", kind="video") == 2
    assert (
        "clips of 4 frames: the autoencoder needs 1 more than a multiple of 2; take 3 or 5" in capsys.readouterr().err
    )


def test_names_of_classes_are_captions_where_there_are_no_others(pictures, tmp_path):
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.new("RGB", (16, 16), (number, len(name), 0)).save(tmp_path / name / f"{number}.png")
    data = ImageData(f"images(path={str(tmp_path)!r}, size=16, held_out=0.3)")
    assert set(data.captions("train") + data.captions("held_out")) == {"cats", "dogs"}


def test_pictures_without_captions_or_classes_are_refused(tmp_path, capsys):
    for number in range(8):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / f"{number}.png")
    assert run(f"images(path={str(tmp_path)!r}, size=16, labels='none', held_out=0.3)", tmp_path / "run") == 2
    assert "has neither captions nor classes" in capsys.readouterr().err
