"""Pictures that runs sampled, encoded anew and small enough for a page that holds everything in one file."""

import base64
import io
import pathlib
import typing
import warnings
from collections.abc import Sequence

from efficientllm.errors import UserError
from efficientllm.report.rows import Row
from efficientllm.untrusted import files, json_text

if typing.TYPE_CHECKING:
    from PIL import Image

GRID = "samples/grid.png"
BESIDE = ("nearest", "base")  # pictures laid out as the grid is: `samples/nearest.png` and so on
BUDGET = 1_500_000  # bytes of all pictures; 2 MB in base64, beside the 2 MB of the plotting library
MOST_RUNS = 300
MOST_PIXELS, MOST_PLACES = 2**26, 4096
_QUALITY = 85
_SIDES = (1024, 768, 512, 384, 256, 192, 128, 96, 64)  # pixels, tried in turn until all pictures fit
_NUMBERS = ("count", "columns", "height", "width", "border")

Picture = dict[str, typing.Any]


def embed_pictures(rows: Sequence[Row], budget: int = BUDGET) -> dict[str, typing.Any]:
    """Reads the pictures of rows -> `{"runs": {path: picture}, "how": text}`, at most `budget` bytes together.

    A picture has `grid`, `nearest` and `base` (data URIs; None without), the `width` and `height` of the grid as drawn,
    and what its `samples.json` says of it. All are encoded alike, so that none looks worse than its neighbour: as PNG,
    or where those are too large as JPEG and scaled. `how` says which. Damaged pictures are left out.
    """
    loaded = {str(row.path): pictures for row in rows if row.reads == "images" and (pictures := _load(row.path.parent))}
    left_out = len(loaded) - MOST_RUNS
    loaded = dict(list(loaded.items())[:MOST_RUNS])
    encoded, how = _fit(
        {(path, name): image for path, pictures in loaded.items() for name, image in pictures.items()}, budget
    )
    runs = {}
    for path, pictures in loaded.items():
        width, height = pictures["grid"].size
        uris = {name: encoded.get((path, name)) for name in ("grid", *BESIDE)}
        about = _describe(pathlib.Path(path).with_name("samples"), (width, height))
        runs[path] = {**uris, "width": width, "height": height, **about}
    if left_out > 0:
        how += f" {left_out} further runs have pictures that are not shown."
    return {"runs": runs, "how": how}


def read_grids(row: Row) -> "dict[str, Image.Image]":
    """Reads `{"grid": image, "nearest": image, "base": image}` of a row's samples as RGB, of those that are there.

    Empty without a grid; damaged ones are left out.
    """
    return _load(row.path.parent)


def _load(folder):
    grid = _read(folder / GRID)
    if grid is None:
        return {}
    beside = {name: _read(folder / "samples" / f"{name}.png") for name in BESIDE}
    return {"grid": grid} | {
        name: image for name, image in beside.items() if image is not None and image.size == grid.size
    }


def _read(file):
    if not files.is_file(file):
        return None
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are checked
            image = Image.open(io.BytesIO(files.read_bytes(file)), formats=("PNG",))
            if image.width * image.height > MOST_PIXELS:
                return None
            return image.convert("RGB")
    except (UserError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None  # the report does without a picture that cannot be read


def _fit(images, budget):
    """`({key: data URI}, how)` of the first encoding of which all fit into the budget."""
    if not images:
        return {}, ""
    encoded, kind, how = {}, "png", "they are PNG, as they were drawn"
    if sum(image.width * image.height for image in images.values()) <= 4 * budget:
        encoded = {key: _png(image) for key, image in images.items()}
    for side in _SIDES:
        if encoded and sum(map(len, encoded.values())) <= budget:
            break
        encoded = {key: _jpeg(image, side) for key, image in images.items()}
        kind, how = "jpeg", f"they are JPEG of quality {_QUALITY}, scaled to {side} pixels where they were larger"
    total = sum(map(len, encoded.values()))
    uris = {key: f"data:image/{kind};base64,{base64.b64encode(data).decode()}" for key, data in encoded.items()}
    return uris, f"{len(images)} pictures lie inside this file, {total / 1e3:,.0f} kB: {how}."


def _png(image):
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def _jpeg(image, side):
    from PIL import Image

    file, scale = io.BytesIO(), min(1.0, side / max(image.size))
    size = [max(1, round(pixels * scale)) for pixels in image.size]
    image.resize(size, Image.Resampling.BOX).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def _describe(folder: pathlib.Path, size: tuple[int, int]) -> Picture:
    """What `samples.json` says of a grid of `size`, as far as it is what a run writes."""
    try:
        about = json_text.read(folder / "samples.json")
    except UserError:
        return {}
    classes, prompts, nearest = about.get("classes"), about.get("prompts"), about.get("nearest")
    if not _is_layout(about, size) or not _is_list(classes, str, about["count"]):
        return {}
    grid = {name: about[name] for name in ("count", "columns", "border")}
    grid |= {"cell": [about["width"], about["height"]], "classes": classes, "how": str(about.get("how", ""))[:200]}
    grid["prompts"] = prompts if _is_list(prompts, str, about["count"]) else []
    if isinstance(nearest, dict) and _is_list(nearest.get("distances"), (int, float), about["count"]):
        unseen, of = nearest.get("unseen"), nearest.get("of")
        grid["distances"] = nearest["distances"]
        grid["unseen"] = unseen if isinstance(unseen, int | float) else None
        grid["of"] = of if isinstance(of, int) else None
    return grid


def _is_layout(about, size):
    """True if the numbers are those of a grid of this size."""
    if not all(type(about.get(name)) is int and about[name] >= 0 for name in _NUMBERS):
        return False
    count, columns, height, width, border = (about[name] for name in _NUMBERS)
    if not (0 < count <= MOST_PLACES and columns and height and width):
        return False
    return size == (columns * (width + border) - border, -(-count // columns) * (height + border) - border)


def _is_list(values, kind, count):
    return isinstance(values, list) and len(values) == count and all(isinstance(value, kind) for value in values)
