"""Clips: what is written is read again, of which files frames are taken, and what is refused in one line."""

import importlib.util
import io

import numpy as np
import pytest
from PIL import Image

from efficientllm.data.images import ImageData, clips, decode
from efficientllm.data.images.decode import Unusable
from efficientllm.errors import UserError
from efficientllm.infer.clips import write_clip

pytestmark = pytest.mark.quick


def draw(frames=5, height=16, width=24, seed=0):
    """Smooth frames, no two alike."""
    corners = np.random.default_rng(seed).integers(0, 256, (frames, 2, 3, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize((width, height), Image.Resampling.BICUBIC)) for x in corners])


def save_gif(path, frames, durations):
    first, *rest = (Image.fromarray(frame) for frame in frames)
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0)
    return path


@pytest.mark.parametrize("fps", [16, 7.5, 25])
def test_a_webp_is_read_as_it_was_written(tmp_path, fps):
    """Frames that repeat, which the file merges, are told by how long they are shown."""
    written = draw()[[0, 1, 1, 2, 3, 3, 3, 4]]
    clip = clips.read_clip(write_clip(tmp_path / "a.webp", written, fps))
    np.testing.assert_array_equal(clip.frames, written)
    assert clip.fps == pytest.approx(fps, rel=0.01)  # of whole milliseconds


def test_gray_clips_are_written(tmp_path):
    gray = draw()[..., :1]
    np.testing.assert_array_equal(clips.read_clip(write_clip(tmp_path / "a.webp", gray, 8)).frames[..., :1], gray)


@pytest.mark.parametrize("height, width", [(16, 24), (15, 21)])
def test_an_mp4_is_read_about_as_it_was_written(tmp_path, height, width):
    """Eight bits of YUV round by 2; H.264 at this quality, and colours at half the resolution, by a few more."""
    pytest.importorskip("av")
    written = draw(7, height, width)
    clip = clips.read_clip(write_clip(tmp_path / "a.mp4", written, 12.5))
    assert clip.frames.shape == written.shape and clip.fps == 12.5
    assert np.abs(clip.frames.astype(int) - written).mean() < 6 < np.abs(written[1:].astype(int) - written[:-1]).mean()


def test_without_pyav_a_webp_is_written_and_videos_are_refused(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "av" else find(name, *rest))
    file = write_clip(tmp_path / "a.mp4", draw(), 10)
    assert file == tmp_path / "a.webp" and list(tmp_path.iterdir()) == [file]
    assert "a.mp4: MP4 needs PyAV (pip install" in caplog.text and "wrote a.webp instead" in caplog.text
    (tmp_path / "b.mp4").write_bytes(b"\0\0\0\x18ftypisom")
    with pytest.raises(UserError, match=r"b.mp4: .* videos, which need PyAV \(pip install .*video"):
        clips.read_clip(tmp_path / "b.mp4")


def test_a_frame_counts_as_often_as_it_is_shown(tmp_path):
    frames = [np.full((4, 4, 3), level, np.uint8) for level in (0, 60, 120)]
    clip = clips.read_clip(save_gif(tmp_path / "a.gif", frames, [40, 120, 80]))
    assert clip.frames[:, 0, 0, 0].tolist() == [0, 60, 60, 60, 120, 120] and clip.fps == 25


def test_frames_of_a_folder_are_ordered_by_their_numbers(tmp_path):
    written = draw(12)
    for index, frame in enumerate(written):
        Image.fromarray(frame).save(tmp_path / f"frame²{index}.png")  # of which a part is a digit, and no number
    (tmp_path / "notes.txt").write_text("no frame")
    clip = clips.read_clip(tmp_path)
    np.testing.assert_array_equal(clip.frames, written)
    assert clip.fps is None


def test_a_clip_is_every_so_many_of_the_first_frames(tmp_path):
    frames = draw(9)
    content = write_clip(tmp_path / "a.webp", frames, 10).read_bytes()
    for source in (content, frames):
        decoded = clips.decode(source, [(3, 16, 16, 3)], 4, "a")[1]
        assert decoded.shape == (3, 16, 16, 3)
        np.testing.assert_array_equal(decoded, frames[::4, :, 4:20])  # the square in the middle
    with pytest.raises(Unusable, match="clips of fewer than 13 frames"):
        clips.decode(content, [(4, 16, 16, 3)], 4, "a")
    gray = clips.decode(frames[..., 0], [(9, 16, 16, 1)], 1, "a")[1]
    np.testing.assert_array_equal(gray[..., 0], frames[:, :, 4:20, 0])


@pytest.mark.parametrize("ending", ["webp", "gif", "mp4"])
@pytest.mark.parametrize("damage", ["cut", "zeros", "empty", "text"])
def test_damaged_files_are_one_line(tmp_path, ending, damage):
    """Cut short or zeroed from the middle on, some decoders still give the frames before: fewer, and no error."""
    if ending == "mp4":
        pytest.importorskip("av")
    file = tmp_path / f"a.{ending}"
    if ending == "gif":
        save_gif(file, draw(8), 50)
    else:
        write_clip(file, draw(8), 10)
    content = file.read_bytes()
    half = len(content) // 2
    made = {"cut": content[:half], "zeros": content[:half] + bytes(half), "empty": b"", "text": b"hello"}
    file.write_bytes(made[damage])
    try:
        assert len(clips.read_clip(file).frames) < 8 and damage in ("cut", "zeros")
    except UserError as error:
        assert str(file) in str(error) and "cannot be read" in str(error) and "\n" not in str(error)


def test_what_is_refused(tmp_path):
    with pytest.raises(UserError, match="none.webp"):
        clips.read_clip(tmp_path / "none.webp")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: .* clips without a frame"):
        clips.read_clip(tmp_path / "empty")
    (tmp_path / "odd").mkdir()
    for name, size in (("1.png", (4, 4)), ("2.png", (5, 4))):
        Image.new("RGB", size).save(tmp_path / "odd" / name)
    with pytest.raises(UserError, match="odd: .* clips whose frames differ in size"):
        clips.read_clip(tmp_path / "odd")
    with pytest.raises(UserError, match=r"a: is an array uint8 \[4, 4\]; uint8 \[F, h, w\]"):
        clips.decode(np.zeros((4, 4), np.uint8), [(1, 4, 4, 3)], 1, "a")
    with pytest.raises(UserError, match="a: is of type list; bytes or a uint8 array"):
        clips.decode([1], [(1, 4, 4, 3)], 1, "a")
    for file, clip, fps, message in (
        ("a.avi", draw(), 8, "a .webp or an .mp4; write a.webp"),
        ("a.webp", draw()[..., :2], 8, r"uint8 \[5, 16, 24, 2\] is no clip"),
        ("a.webp", draw().astype(float), 8, "float64 .* is no clip"),
        ("a.webp", draw(), 0, "fps = 0: must be frames per second"),
    ):
        with pytest.raises(UserError, match=message):
            write_clip(tmp_path / file, clip, fps)


def test_moving_png(tmp_path):
    frames = draw(3)
    first, *rest = (Image.fromarray(frame) for frame in frames)
    stream = io.BytesIO()
    first.save(stream, "PNG", save_all=True, append_images=rest, duration=100)
    np.testing.assert_array_equal(clips.decode(stream.getvalue(), [(3, 16, 16, 3)], 1, "a")[1], frames[:, :, 4:20])
    assert decode.decode(stream.getvalue(), [(16, 16, 3)], "a")[1].shape == (16, 16, 3)  # as a picture: its first frame


def test_letters_move_and_turn():
    read = ImageData("moving_glyphs(letters='LT', frames=5, size=32, channels=1)")
    assert len(read.pictures) == 22 * 2 * 6 and read.num_classes == 12 and read.image_shape == (5, 32, 32, 1)
    assert read.pictures.captions[0] == f"the letter {read.class_names[0]}" == "the letter L moving right"
    rows, columns = np.mgrid[:32, :32]
    for index, label in enumerate(read.pictures.labels):
        clip = read.pictures[index][..., 0].astype(float)
        ink = clip.sum((1, 2))
        y, x = ((clip * axis).sum((1, 2)) / ink for axis in (rows, columns))
        motion = read.class_names[label][2:]
        still = {"right": y, "left": y, "up": x, "down": x}.get(motion.removeprefix("moving "))
        if still is None:
            assert abs(x[0] + x[-1] - 31) < 1.5 and abs(y[0] + y[-1] - 31) < 1.5  # half a turn about the middle
            continue
        sign = {"right": 1, "left": -1, "down": 1, "up": -1}[motion.removeprefix("moving ")]
        np.testing.assert_allclose(np.diff(y if still is x else x), 4 * sign, atol=1e-6)
        np.testing.assert_allclose(still, still[0])
        assert np.ptp(ink) == 0  # nothing leaves the clip
