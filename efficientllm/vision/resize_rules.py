"""Sizes to which processors of vision-language models resize an image: arithmetic of its height and width alone."""

import math

from efficientllm.errors import UserError

MAX_RATIO = 200  # of the longer side to the shorter one


def rounded_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Computes the height and width of an image of any size (Qwen2-VL: arXiv:2409.12191, Section 2.1).

    Sides are multiples of `factor`, the nearest ones where the pixels are then within the limits; otherwise both sides
    shrink, rounded down, or grow, rounded up. Raises UserError for an image more than 200 times as long as wide.
    """
    _check_ratio(height, width)
    rounded = round(height / factor) * factor, round(width / factor) * factor
    if math.prod(rounded) > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return tuple(max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))  # type: ignore[return-value]
    if math.prod(rounded) < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return tuple(math.ceil(side * grow / factor) * factor for side in (height, width))  # type: ignore[return-value]
    return rounded


def shortest_edge_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Computes the height and width of an image whose shorter side becomes `side`; the longer is rounded down.

    Raises UserError for an image more than 200 times as long as wide, which would become too large.
    """
    _check_ratio(height, width)
    longer = int(side * max(height, width) / min(height, width))
    return (side, longer) if height <= width else (longer, side)


def _check_ratio(height, width):
    if max(height, width) / min(height, width) > MAX_RATIO:
        raise UserError(f"{width} x {height} pixels: the longer side is over {MAX_RATIO} times the shorter; crop it")


def tile_grid(height: int, width: int, side: int, fewest: int, most: int) -> tuple[int, int]:
    """Chooses the columns and rows of tiles of an image (InternVL 1.5: arXiv:2404.16821, Section 3.2).

    The grid of `fewest` to `most` tiles with the nearest ratio of its sides; of several, the one with the most tiles
    that the image fills by more than a half.
    """
    grids = [(c, r) for c in range(1, most + 1) for r in range(1, most + 1) if fewest <= c * r <= most]
    best, best_distance = (1, 1), math.inf
    for columns, rows in sorted(grids, key=math.prod):
        distance = abs(width / height - columns / rows)
        fills = height * width > 0.5 * side * side * columns * rows
        if distance < best_distance or (distance == best_distance and fills):
            best, best_distance = (columns, rows), distance
    return best
