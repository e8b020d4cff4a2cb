"""Tuning of pipelines on pictures and clips of several sizes: buckets from the data to the row, and a resumed run."""

import re

import numpy as np
import pytest
from PIL import Image

import runs
from efficientllm import main
from efficientllm.infer.clips import write_clip
from efficientllm.record.row import read_record
from infer import pipelines

pytestmark = pytest.mark.xdist_group("diffusers")
CAPTIONS = ("a red square", "a green one", "a blue one")
LORA = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The data spec of 24 pictures, a third of them tall, the others squares; a token is a square of four pixels."""
    folder, noise = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(24):
        size = (30, 14, 3) if number % 3 == 0 else (17, 16, 3)
        Image.fromarray(noise.integers(0, 256, size, np.uint8)).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(CAPTIONS[number % 3])
    return f"images(path={str(folder)!r}, size=12, buckets=3, captions='txt', labels='none', held_out=0.3)"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """The data spec of 16 clips of 3 to 6 frames, half of them wide."""
    folder, noise = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    for number in range(16):
        size = (3 + number % 4, 8, 16) if number % 2 else (3 + number % 4, 12, 12)
        write_clip(folder / f"{number:02}.webp", noise.integers(0, 256, (*size, 3), np.uint8), 8)
        (folder / f"{number:02}.txt").write_text(CAPTIONS[number % 3])
    sizes = "size=12, buckets=3, frames=5, shorter=(3,)"
    return f"videos(path={str(folder)!r}, {sizes}, captions='txt', labels='none', held_out=0.2)"


def run(kind, data, workdir, **changes):
    values = {
        "model.pretrained": str(pipelines.folder(kind)),
        "model.precision": "float32",
        "text_states": f"encoders(length={20 if kind == 'image' else 40})",
        "data": data,
        **{"train.steps": 8, "train.batch_size": 8, "train.log_every": 1, "train.schedule": "constant(peak=0.01)"},
        **{"eval.every": 0, "eval.batches": 1, "checkpoint.every": 0, "sample.images": 0, "infer.guidance": 2.0},
        "infer.solver": "euler(steps=2)" if kind == "image" else "unipc(steps=2)",
    }
    flags = [f"--config.{key}={value}" for key, value in (values | changes).items()]
    return main.main([f"--config={runs.ROOT}/configs/tune_{kind}.py:lora", f"--workdir={workdir}", *flags])


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """A finished run of two buckets."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    assert run("image", pictures, workdir) == 0
    return workdir


@pytest.mark.slow
def test_a_run_of_two_buckets_says_them_in_its_row_and_its_log(whole):
    record, log = read_record(whole / "record.json"), (whole / "log.txt").read_text()
    buckets = record["provenance"]["data"]["buckets"]
    assert [bucket["size"] for bucket in buckets] == ["12 x 12", "16 x 8"]
    assert [bucket["train_images"] + bucket["held_out_images"] for bucket in buckets] == [16, 8]
    assert "bucket 12 x 12: 16 pictures" in log and "bucket 16 x 8: 8 pictures" in log
    rows = re.search(r"an epoch is (\d+) batches of one bucket each; (\d+) of their rows", log)
    batches = sum(-(-bucket["train_images"] // 8) for bucket in buckets)
    assert rows and int(rows[1]) == batches
    assert np.isfinite(record["quality"]["eval_loss"]) and record["physical"]["mfu_gemm"] > 0


@pytest.mark.slow
def test_stopped_and_resumed_it_is_the_same_bit_for_bit(whole, pictures, tmp_path):
    """Not at the end of an epoch, and with mirrored pictures and dropped captions."""
    assert run("image", pictures, tmp_path / "run", **{"train.steps": 3}) == 0
    (tmp_path / "run" / "record.json").unlink()
    assert run("image", pictures, tmp_path / "run") == 0
    assert "resuming from step 3" in (tmp_path / "run" / "log.txt").read_text()
    assert runs.losses(tmp_path / "run") == runs.losses(whole)
    assert (tmp_path / "run" / LORA).read_bytes() == (whole / LORA).read_bytes()


@pytest.mark.slow
def test_clips_of_two_lengths_and_sizes_are_tuned_on(clips, tmp_path):
    changes = {"train.steps": 6, "sample.images": 1, "profile.steps": "1:6"}
    assert run("video", clips, tmp_path / "run", **changes) == 0
    record = read_record(tmp_path / "run" / "record.json")
    profile = record["profile"]  # of several programs, whose operations have the same names
    assert profile["steps"] == 6 and sum(row["flops"] for row in profile["operations"]) > 0
    assert 0 < sum(row["seconds"] for row in profile["operations"]) <= profile["step_s"]
    sizes = {bucket["size"] for bucket in record["provenance"]["data"]["buckets"]}
    assert sizes == {f"{frames} frames of {size}" for frames in (3, 5) for size in ("12 x 12", "8 x 16")}
    assert np.isfinite(record["quality"]["eval_loss"])


@pytest.mark.parametrize(
    "fields, message",
    [
        ("size=12, buckets=0", "buckets = 0: must be from 1 to 64"),
        ("size=14, buckets=3", "size = 14: is no multiple of the 4 pixels of a token; write 12 or 16"),
        ("buckets=((12, 12), (20, 8))", "table = 4 holds no grid of 5 x 2 tokens"),
    ],
)
def test_bad_buckets_are_one_line(fields, message, pictures, tmp_path, capsys):
    data = pictures.replace("size=12, buckets=3", fields).replace("held_out", "flip=False, held_out")
    pipelines.folder("image")  # prints progress where it is not made yet
    capsys.readouterr()
    assert run("image", data, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert message in error and "config.data" in error and error.count("\n") == 1, error
