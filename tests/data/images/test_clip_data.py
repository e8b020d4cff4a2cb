"""Clips of folders as training sees them: found, captioned, split, resumed, and encoded once."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from autoencoders import wan_folders
from efficientllm.data.images import ImageData, read_source
from efficientllm.data.images.latents import to_float
from efficientllm.errors import UserError
from efficientllm.infer.clips import write_clip
from efficientllm.registry import build

pytestmark = pytest.mark.quick
MOTIONS = ("jump", "walk")


@pytest.fixture
def folder(tmp_path):
    """Twelve files of 6 to 8 frames and two folders of frames, in two class folders, each with a caption beside it."""
    draw, root = np.random.default_rng(0), tmp_path / "clips"
    for index in range(14):
        clip = draw.integers(0, 256, (6 + index % 3, 8, 10, 3), np.uint8)
        path = root / MOTIONS[index % 2] / f"{index:02}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f"{path.name}.txt").write_text(f"clip {index}")
        if index < 12:
            write_clip(path.with_suffix(".webp"), clip, 10)
        else:
            path.mkdir()
            for frame, pixels in enumerate(clip):
                Image.fromarray(pixels).save(path / f"{frame}.png")
    return root


def spec_of(folder, fields=""):
    return f"videos(path={str(folder)!r}, frames=5, size=8, held_out=0.3{fields})"


def test_clips_are_found_with_their_classes_and_captions(folder):
    read = ImageData(spec_of(folder, ", captions='txt'"))
    assert len(read.pictures) == 14 and read.class_names == list(MOTIONS) and read.image_shape == (5, 8, 8, 3)
    assert sorted(read.pictures.captions) == sorted(f"clip {index}" for index in range(14))
    labels = dict(zip(read.pictures.captions, read.pictures.labels.tolist(), strict=True))
    assert all(labels[f"clip {index}"] == index % 2 for index in range(14))
    frames = [Image.open(folder / "jump" / "12" / f"{frame}.png") for frame in range(5)]
    expected = np.stack([np.asarray(frame.crop((1, 0, 9, 8))) for frame in frames])
    np.testing.assert_array_equal(read.pictures[read.pictures.captions.index("clip 12")], expected)
    assert read.notes()[0].startswith("14 clips of 5 frames of 8 x 8 in 2 classes")


def test_captions_of_a_file_and_clips_that_are_too_short(folder):
    rows = [{"file_name": "walk/01.webp", "caption": "one"}, {"video": "jump/12", "text": "twelve"}]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = ImageData(spec_of(folder, ", captions='captions.jsonl', labels='none'"))
    assert sorted(read.pictures.captions) == ["one", "twelve"]
    assert any("skipped 12: pictures without a caption" in note for note in read.notes())
    long = ImageData(f"videos(path={str(folder)!r}, frames=4, stride=2, size=8)")  # the first 7 frames
    assert len(long.pictures) == 14 - 5 and any("clips of fewer than 7 frames" in note for note in long.notes())


def test_a_damaged_clip_is_skipped_and_named(folder):
    (folder / "walk" / "broken.webp").write_bytes(b"RIFF\0\0\0\0WEBPnothing")
    notes = ImageData(spec_of(folder)).notes()
    assert len(notes) == 2 and "skipped 1" in notes[1] and "broken.webp" in notes[1]


def test_the_split_is_by_content(folder):
    first = ImageData(spec_of(folder))
    held_out = set(first.pictures.contents[first.indices("held_out")].tolist())
    assert 2 <= len(held_out) <= 8
    (folder / "walk" / "01.webp").rename(folder / "jump" / "zz.webp")
    moved = ImageData(spec_of(folder))
    assert set(moved.pictures.contents[moved.indices("held_out")].tolist()) == held_out


@pytest.mark.parametrize("storage", ["cached", "on the fly"])
def test_training_resumes_bit_for_bit_and_mirrors_whole_clips(folder, storage, monkeypatch):
    if storage == "on the fly":
        monkeypatch.setattr(read_source, "CACHED_BYTES", 1000)
    read = ImageData(spec_of(folder))
    batches = read.train(4, seed=0)
    first = list(itertools.islice(batches, 3))
    state = json.dumps(batches.get_state())
    rest = list(itertools.islice(batches, 4))
    batches.close()
    again = read.train(4, seed=0)
    again.set_state(json.loads(state))
    for expected, batch in zip(rest, again, strict=False):
        for key in expected:
            np.testing.assert_array_equal(batch[key], expected[key])
    again.close()
    clips = {to_float(read.pictures[i]).tobytes(): i for i in read.indices("train")}
    mirrored = {to_float(read.pictures[i][:, :, ::-1]).tobytes(): i for i in read.indices("train")}
    seen = [images.tobytes() for batch in first + rest for images in batch["images"]]
    assert all((row in clips) != (row in mirrored) for row in seen)
    assert any(row in clips for row in seen) and any(row in mirrored for row in seen)
    assert (read.pictures.pixels is None) == (storage == "on the fly")


def test_latents_of_clips_are_computed_once(folder, tmp_path):
    path = wan_folders.save(tmp_path / "vae", wan_folders.TINIER)
    autoencoder, calls = build("autoencoder", f"wan(path={str(path)!r})"), []

    def encode(clips):
        calls.append(clips.shape)
        return autoencoder.posterior(clips)

    def read():
        return ImageData(spec_of(folder), None, encode, "key", 2, autoencoder.latent_shape)

    assert read().image_shape == (3, 4, 4, 4) == autoencoder.latent_shape((5, 8, 8, 3))
    assert set(calls) == {(3, 5, 8, 8, 3)} and len(calls) == 2 * 5  # of 14 clips and their mirror images
    batch = next(iter(read().held_out(4)))
    assert len(calls) == 10 and batch["images"].shape == batch["logvar"].shape == (4, 3, 4, 4, 4)
    plain = next(iter(ImageData(spec_of(folder)).held_out(4)))
    np.testing.assert_allclose(batch["images"][:3], autoencoder.posterior(plain["images"][:3])[0], atol=1e-5)


def test_frames_that_the_autoencoder_refuses(folder, tmp_path):
    path = wan_folders.save(tmp_path / "vae")
    autoencoder = build("autoencoder", f"wan(path={str(path)!r})")
    spec = spec_of(folder).replace("frames=5", "frames=6")
    with pytest.raises(UserError, match=r"^data = .*clips of 6 frames: .* multiple of 2; take 5 or 7") as refused:
        ImageData(spec, None, autoencoder.posterior, "key", 4, autoencoder.latent_shape)
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="frames = 0: must be"):
        ImageData(spec.replace("frames=6", "frames=0"))
    with pytest.raises(UserError, match="path = .*none': no file matches"):
        ImageData(f"videos(path={str(tmp_path / 'none')!r})").notes()
    with pytest.raises(UserError, match="motion = 'rigt': finds none of the motions; they are moving right"):
        ImageData("moving_glyphs(motion='rigt')").notes()
