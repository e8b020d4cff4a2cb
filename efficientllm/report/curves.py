"""Training curves of runs, from their TensorBoard event files."""

import logging
import math

from efficientllm.untrusted import files

TAGS = ("loss", "eval_loss", "tokens_per_s", "learning_rate", "grad_norm")
MOST_POINTS, MOST_IN_ALL = 200, 200_000  # of a curve, of all curves of a report


def read_all(rows):
    """`{path: curves}`, the coarser the more rows there are: a page is opened whole."""
    most = min(MOST_POINTS, max(20, MOST_IN_ALL // (len(rows) * len(TAGS) or 1)))
    return {str(row.path): read(row, most) for row in rows}


def read(row, most=MOST_POINTS):
    """`{tag: {"steps": [...], "values": [...]}}` of a run's folder, at most `most` evenly taken points each."""
    folder = row.path.parent
    written = list(folder.glob("events.out.tfevents.*"))
    if not written or not all(map(files.is_file, written)):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    found = {}
    for tag in TAGS:
        if tag in events.Tags()["tensors"]:
            # A resumed run repeats steps: the last value written for a step stands.
            written = sorted(events.Tensors(tag), key=lambda event: event.wall_time)
            points = {event.step: float(make_ndarray(event.tensor_proto)) for event in written}
            steps = thin(sorted(step for step, value in points.items() if math.isfinite(value)), most)
            found[tag] = {"steps": steps, "values": [float(f"{points[step]:.6g}") for step in steps]}
    return found


def thin(steps, most=MOST_POINTS):
    """At most `most` of the steps, evenly spaced, the first and the last among them."""
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]
