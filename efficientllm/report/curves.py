"""Training curves of runs, from their TensorBoard event files."""

import logging
import math
from collections.abc import Sequence

from efficientllm.report.rows import Row
from efficientllm.untrusted import files

TAGS = ("loss", "eval_loss", "tokens_per_s", "learning_rate", "grad_norm")
Curves = dict[str, dict[str, list]]  # `{tag: {"steps": [...], "values": [...]}}`
MOST_POINTS, MOST_IN_ALL = 200, 200_000  # points of a curve, of all curves of a report


def read_all_curves(rows: Sequence[Row]) -> dict[str, Curves]:
    """Curves of all rows by path; more rows get fewer points each, as a page embeds them all."""
    most = min(MOST_POINTS, max(20, MOST_IN_ALL // (len(rows) * len(TAGS) or 1)))
    return {str(row.path): read_curves(row, most) for row in rows}


def read_curves(row: Row, most: int = MOST_POINTS) -> Curves:
    """`{tag: {"steps": [...], "values": [...]}}` of a run's folder, at most `most` evenly spaced points each."""
    folder = row.path.parent
    written = list(folder.glob("events.out.tfevents.*"))
    if not written or not all(map(files.is_file, written)):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    curves: Curves = {}
    for tag in TAGS:
        if tag in events.Tags()["tensors"]:
            # A resumed run repeats steps: the last value of a step counts.
            by_time = sorted(events.Tensors(tag), key=lambda event: event.wall_time)
            points = {event.step: float(make_ndarray(event.tensor_proto)) for event in by_time}
            steps = thin_steps(sorted(step for step, value in points.items() if math.isfinite(value)), most)
            curves[tag] = {"steps": steps, "values": [float(f"{points[step]:.6g}") for step in steps]}
    return curves


def thin_steps(steps: list[int], most: int = MOST_POINTS) -> list[int]:
    """At most `most` of the steps, evenly spaced, with the first and the last."""
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]
