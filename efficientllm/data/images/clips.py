"""Clips: moving pictures (WebP, GIF, APNG), videos and folders of frames, decoded to uint8 arrays.

Moving pictures are read by Pillow, videos by PyAV, an optional package. Each frame is prepared as a picture is:
upright, on white, cropped to the size of a bucket.
"""

import importlib.util
import io
import itertools
import os
import re
import typing
from collections.abc import Sequence

import numpy as np
from PIL import Image

from efficientllm.data.base import MAX_IMAGE_BYTES, Content, Picture
from efficientllm.data.images import decode as pictures
from efficientllm.data.images.buckets import Shape, frame_count, nearest_bucket
from efficientllm.data.images.decode import MAX_PIXELS, Unusable
from efficientllm.errors import UserError
from efficientllm.runtime import optional_packages
from efficientllm.typing import PathLike
from efficientllm.untrusted import files

MOVING = (".webp", ".gif", ".apng")
VIDEOS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")
STILL = (".png", ".jpg", ".jpeg", ".jpe", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm", ".avif", ".jp2")
MOST_BYTES = 4 << 30  # of a clip that is read whole
Frame = tuple[Image.Image, float]  # and how many milliseconds it is shown; 0 where that is not known


class Clip(typing.NamedTuple):
    """Frames, uint8 `[F, h, w, 3]`, and how many there are in a second, None where that is not known."""

    frames: np.ndarray
    fps: float | None


def read_clip(path: PathLike) -> Clip:
    """Reads a moving picture, a video or a folder of frames, at its own size.

    A frame that is shown n times as long as the shortest counts n times. Raises UserError that names a file which
    cannot be read, is damaged or is no clip.
    """
    path = os.fspath(path)
    try:
        content = path if os.path.isdir(path) else files.read_bytes(path, MAX_IMAGE_BYTES)
        shown = list(_shown(_frames(content, path)))
        _check_bytes(sum(itertools.starmap(_bytes_of, shown)))
        _check_sizes([image for image, _ in shown])
        frames = _stacked([image for image, _ in shown])
    except Unusable as error:
        detail = f" ({error.detail})" if error.detail else ""
        raise UserError(f"{path}: cannot be read: it is one of the {error.reason}{detail}") from None
    total = sum(milliseconds for _, milliseconds in shown)
    return Clip(frames, 1000 * len(frames) / total if total else None)


def decode(content: Content, shapes: Sequence[Shape], stride: int, name: str) -> tuple[int, np.ndarray]:
    """Decodes every `stride`-th of the first frames of a clip to its bucket's index and uint8 `(F, h, w, C)` of it.

    Raises Unusable for what is no clip, damaged, too short or too large, and UserError for content of another type.
    """
    counts = [frame_count(shape) for shape in shapes]
    first, last = ((count - 1) * stride + 1 for count in (min(counts), max(counts)))
    shown = [image for image, _ in itertools.islice(_shown(itertools.islice(_frames(content, name), last)), last)]
    if len(shown) < first:
        raise Unusable(f"clips of fewer than {first} frames", f"{len(shown)}")
    shown = shown[::stride]
    bucket = nearest_bucket(shapes, shown[0].height, shown[0].width, len(shown))
    return bucket, np.stack([pictures.to_pixels(image, shapes[bucket]) for image in shown[: counts[bucket]]])


def decoder_version() -> str:
    """The version of what decodes videos, empty without it."""
    if importlib.util.find_spec("av") is None:
        return ""
    import av

    return av.__version__


def folder_frames(folder: str) -> list[str]:
    """The files of still pictures directly in a folder, in the order of the numbers in their names."""
    paths = [entry.path for entry in os.scandir(folder) if entry.name.lower().endswith(STILL) and entry.is_file()]
    return sorted(paths, key=lambda file: [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", file)])


def read_folder(folder: str, most: int) -> np.ndarray:
    """Reads the first `most` frames of a folder, uint8 `[F, h, w, 3]`. Raises Unusable for one that is no picture."""
    images = [image for image, _ in itertools.islice(_frames(folder, folder), most)]
    _check_sizes(images)
    return _stacked(images)


def _stacked(images):
    """Images as one array, each converted into its place: a copy of all would double the memory."""
    frames = np.empty((len(images), images[0].height, images[0].width, 3), np.uint8)
    for frame, image in zip(frames, images, strict=True):
        frame[:] = pictures.convert(image, 3)
    return frames


def _bytes_of(image, milliseconds):
    return 3 * image.width * image.height


def _check_bytes(size):
    if size > MOST_BYTES:
        raise Unusable(f"clips of more than {MOST_BYTES >> 30} GiB")


def _check_frame(image):
    """Raises Unusable for a frame too large to be decoded."""
    if image.width * image.height > MAX_PIXELS:
        raise Unusable(f"clips of more than {MAX_PIXELS:,} pixels a frame", f"{image.width} x {image.height}")
    _check_bytes(_bytes_of(image, 0))


def _check_sizes(images):
    if not images:
        raise Unusable("clips without a frame")
    if any(image.size != images[0].size for image in images):
        raise Unusable("clips whose frames differ in size")


def _shown(frames: typing.Iterator[Frame]) -> typing.Iterator[Frame]:
    """Repeats frames by how long they are shown, in units of the shortest."""
    listed, size = [], 0
    for frame in frames:
        size += _bytes_of(*frame)
        _check_bytes(size)
        listed.append(frame)
    shortest = min((milliseconds for _, milliseconds in listed if milliseconds > 0), default=0)
    for image, milliseconds in listed:
        count = max(1, round(milliseconds / shortest)) if shortest else 1
        yield from itertools.repeat((image, milliseconds / count), count)


def _frames(content, name) -> typing.Iterator[Frame]:
    """The frames of a folder (its path), of an array, or of the bytes of a file, in the order of time."""
    if isinstance(content, str):
        for file in folder_frames(content):
            yield pictures.load(pictures.read(Picture(file))), 0
    elif isinstance(content, np.ndarray):
        _check_array(content, name)
        yield from ((Image.fromarray(frame[..., 0] if frame.shape[2:] == (1,) else frame), 0) for frame in content)
    elif not isinstance(content, bytes):
        raise UserError(f"{name}: is of type {type(content).__name__}; bytes or a uint8 array is needed for a clip")
    elif _is_video(content):
        yield from _of_video(content)
    else:
        yield from _of_picture(content)


def _check_array(content, name):
    """Raises UserError for an array that is no clip."""
    shape, is_gray = content.shape, content.ndim == 3
    if content.dtype != np.uint8 or 0 in shape or not (is_gray or content.ndim == 4 and shape[3] in (1, 3, 4)):
        array = f"{name}: is an array {content.dtype} {list(shape)}"
        raise UserError(f"{array}; uint8 [F, h, w] or [F, h, w, 1, 3 or 4] is needed for a clip")


def _is_video(content):
    """Whether bytes begin as MP4 and QuickTime, Matroska and WebM, or AVI do."""
    is_mp4 = content[4:8] in (b"ftyp", b"moov", b"mdat") and content[8:12] not in (b"avif", b"avis", b"heic")
    return is_mp4 or content[:4] == b"\x1a\x45\xdf\xa3" or content[:4] == b"RIFF" and content[8:12] == b"AVI "


def _of_picture(content):
    """The frames of a moving picture."""
    pictures.load(content)  # refuses what is no picture
    image = pictures.open_image(content)
    try:
        for index in range(getattr(image, "n_frames", 1)):  # of still formats Pillow has no such attribute
            image.seek(index)
            _check_frame(image)  # a frame of a GIF may be larger than the first
            image.load()
            yield image.copy(), float(image.info.get("duration") or 0)
    except Unusable:
        raise
    except Exception as error:  # of damaged files Pillow's decoders raise a dozen types
        raise Unusable("damaged clips", error) from None


def _of_video(content):
    """The frames of a video."""
    if importlib.util.find_spec("av") is None:
        raise Unusable("videos, which need PyAV", optional_packages.remedy("video"))
    import av

    try:
        with av.open(io.BytesIO(content)) as container:
            stream = next(iter(container.streams.video), None)
            decoder = stream and stream.codec_context
            if decoder is None:
                raise Unusable("files without a video stream that can be decoded")
            if decoder.width * decoder.height > MAX_PIXELS:
                raise Unusable(f"videos of more than {MAX_PIXELS:,} pixels", f"{decoder.width} x {decoder.height}")
            milliseconds = float(1000 / stream.average_rate) if stream.average_rate else 0.0
            for frame in container.decode(stream):
                yield frame.to_image(), milliseconds
    except (av.FFmpegError, ValueError) as error:
        raise Unusable("damaged clips", error) from None
