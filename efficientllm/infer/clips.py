"""Files of clips: moving WebP by Pillow, MP4 by PyAV where it is installed."""

import fractions
import importlib.util
import logging
import pathlib

import numpy as np

from efficientllm.errors import UserError
from efficientllm.infer.pictures import image_grid, write_png
from efficientllm.runtime.atomic_write import replacing
from efficientllm.runtime.optional_packages import remedy
from efficientllm.typing import PathLike

FPS = 16  # of Wan 2.1; what a model learns from has no rate
QUALITY = "18"  # constant rate factor of H.264: differences that are hardly seen
log = logging.getLogger("efficientllm")


def clip_grid(clips_BFhwC: np.ndarray, columns: int = 0) -> np.ndarray:
    """Arranges clips of equal length in rows of `columns`, uint8 `[F, height, width, C]`, as `image_grid` does."""
    return np.stack([image_grid(clips_BFhwC[:, frame], columns) for frame in range(clips_BFhwC.shape[1])])


def film_strips(clips_BFhwC: np.ndarray) -> np.ndarray:
    """Arranges the frames of each clip from left to right, `[B, h, F w, C]`, to be looked at as a picture."""
    B, F, h, w, C = clips_BFhwC.shape
    return np.moveaxis(clips_BFhwC, 1, 2).reshape(B, h, F * w, C)


def sample_grid(images_BhwC: np.ndarray) -> np.ndarray:
    """Arranges pictures about in a square, and the film strips of clips below one another, uint8 `[h, w, C]`."""
    return image_grid(film_strips(images_BhwC), 1) if images_BhwC.ndim == 5 else image_grid(images_BhwC)


def write_grids(folder: pathlib.Path, images_BhwC: np.ndarray, name: str = "grid", fps: float = FPS) -> np.ndarray:
    """Writes `NAME.png`, and of clips a moving `NAME.webp` too; returns what is in the former."""
    grid = sample_grid(images_BhwC)
    write_png(folder / f"{name}.png", grid)
    if images_BhwC.ndim == 5:
        write_clip(folder / f"{name}.webp", clip_grid(images_BhwC), fps)
    return grid


def write_samples(folder: pathlib.Path, images_BhwC: np.ndarray, fps: float = FPS, first: int = 0) -> None:
    """Writes pictures as `000.png` and so on, from the number `first`.

    Clips are `000.mp4`, or `.webp` without PyAV, which it says once.
    """
    for number, image in enumerate(images_BhwC, first):
        if image.ndim == 4:
            write_clip(folder / f"{number:03}.mp4", image, fps, quiet=number > 0)
        else:
            write_png(folder / f"{number:03}.png", image)


def write_clip(file: PathLike, clip_FhwC: np.ndarray, fps: float, quiet: bool = False) -> pathlib.Path:
    """Writes frames, uint8 `[F, h, w, 1 or 3]`, as `.webp` (lossless) or `.mp4` (H.264), and returns the file.

    Without PyAV it writes a WebP instead of an MP4, and says so unless `quiet`. Raises UserError for another ending,
    without Pillow, and for what is no clip.
    """
    file = pathlib.Path(file)
    _check(file, clip_FhwC, fps)
    if file.suffix == ".mp4" and importlib.util.find_spec("av") is None:
        webp = file.with_suffix(".webp")
        if not quiet:
            log.info(f"{file}: MP4 needs PyAV ({remedy('video')}); wrote {webp.name} instead")
        file = webp
    clip_FhwC = np.ascontiguousarray(np.broadcast_to(clip_FhwC, (*clip_FhwC.shape[:3], 3)))
    with replacing(file) as temporary:
        (_write_mp4 if file.suffix == ".mp4" else _write_webp)(temporary, clip_FhwC, fps)
    return file


def _check(file, clip_FhwC, fps):
    if file.suffix not in (".webp", ".mp4"):
        raise UserError(f"{file}: a clip is a .webp or an .mp4; write {file.with_suffix('.webp').name}")
    if importlib.util.find_spec("PIL") is None:
        raise UserError(f"{file}: a clip needs Pillow; {remedy('images')}")
    if clip_FhwC.dtype != np.uint8 or clip_FhwC.ndim != 4 or 0 in clip_FhwC.shape or clip_FhwC.shape[-1] not in (1, 3):
        array = f"{clip_FhwC.dtype} {list(clip_FhwC.shape)}"
        raise UserError(f"{file}: an array {array} is no clip; decode latents to uint8 [F, h, w, 1 or 3] first")
    if not 0.01 <= fps <= 1000:
        raise UserError(f"{file}: fps = {fps}: must be frames per second, 0.01 to 1000")


def _write_webp(file, clip_FhwC, fps):
    """Frames last whole milliseconds, which differ by one where fps does not divide 1000."""
    from PIL import Image

    ends = [round(frame * 1000 / fps) for frame in range(len(clip_FhwC) + 1)]
    durations = [end - start for start, end in zip(ends, ends[1:], strict=False)]
    first, *rest = map(Image.fromarray, clip_FhwC)
    first.save(file, "WEBP", save_all=True, append_images=rest, duration=durations, loop=0, lossless=True)


def _write_mp4(file, clip_FhwC, fps):
    """Colours are at half the resolution, as every player reads them, unless a side is odd."""
    import av

    _, height, width, _ = clip_FhwC.shape
    with av.open(str(file), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fractions.Fraction(fps).limit_denominator(1001))
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv444p" if width % 2 or height % 2 else "yuv420p"
        stream.options = {"crf": QUALITY}
        for frame_hwC in clip_FhwC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_hwC, format="rgb24")))
        container.mux(stream.encode())
