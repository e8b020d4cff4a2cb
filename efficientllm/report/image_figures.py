"""Figures of runs on pictures: held-out loss by noise level, and samples of every variant side by side."""

import typing
from collections.abc import Mapping, Sequence

from efficientllm.report import sampled_pictures
from efficientllm.report.columns import LEVEL_LOSS
from efficientllm.report.rows import Row

LEVELS = range(1, 8)  # eighths of the range of noise
BASE = "before tuning"  # the title of its samples
_COLUMNS = 4  # of grids in a row


def draw_levels(group: Mapping[str, typing.Any], colours: Sequence[str]) -> typing.Any:
    """Draws the held-out loss at each noise level, a line a variant; None where no variant has all levels."""
    import matplotlib.pyplot as plt

    keys = [f"{LEVEL_LOSS}{level}" for level in LEVELS]
    lines = [(v["variant"], [v["cells"].get(key, {}).get("mean") for key in keys]) for v in group["variants"]]
    if all(None in values for _, values in lines):
        return None
    figure, axes = plt.subplots(figsize=(6, 3.5))
    for (name, values), colour in zip(lines, colours, strict=True):
        if None not in values:
            axes.plot([level / 8 for level in LEVELS], values, "o-", ms=3, lw=1, color=colour, label=name)
    axes.set_xticks([level / 8 for level in LEVELS], [f"{level}/8" for level in LEVELS])
    axes.set_xlabel("noise level, as a share of the range")
    axes.set_ylabel("held-out loss")
    axes.legend(frameon=False)
    return figure


def draw_samples(group: Mapping[str, typing.Any], rows: Mapping[str, Row]) -> typing.Any:
    """Draws the samples of each variant's first run that has some; None without any. `rows` are by path.

    Those of tuned models stand beside the first one's samples before tuning, of the same prompts or classes and noise.
    """
    import matplotlib.pyplot as plt

    grids: dict[str, typing.Any] = {}
    for variant in group["variants"]:
        read = (sampled_pictures.read_grids(rows[path]) for path in variant["paths"] if rows[path].reads == "images")
        if images := next(filter(None, read), None):
            grids = {BASE: images["base"]} | grids if "base" in images and BASE not in grids else grids
            grids[variant["variant"]] = images["grid"]
    if not grids:
        return None
    columns = min(_COLUMNS, len(grids))
    lines = -(-len(grids) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(2.4 * columns, 2.7 * lines), squeeze=False)
    panels: list[typing.Any] = [*axes.flat]
    for panel in panels:
        panel.axis("off")
    for panel, (name, image) in zip(panels, grids.items(), strict=False):
        panel.imshow(image, interpolation="nearest")
        panel.set_title(name, fontsize=8)
    return figure
