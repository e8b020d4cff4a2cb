"""Pictures of a planned row or prompt, of which sizes alone are known: `config.plan.images`."""

import math

from efficientllm.errors import UserError, short_repr
from efficientllm.run_description import RunDescription
from efficientllm.vision.processors import read_processor
from efficientllm.vision.tower_rows import count_slots

Grids = tuple[tuple[int, int, int], ...]


def grids(description: RunDescription, length: int) -> Grids:
    """Returns tiles, rows and columns of patches of each picture, as the model's own processor resizes it.

    Raises UserError for a model that reads no pictures, and for pictures of more tokens than a row has, `length`.
    """
    images = description.config.plan.images
    where = f"config.plan.images = {short_repr(images)}"
    if not images:
        return ()
    if description.lm.reads != "text and images":
        raise UserError(f"{where}: the model reads no pictures; leave it out, or name a vision-language model")
    folder = None if description.source is None else description.source.tokenizer_path
    processor = read_processor(folder, description.lm)
    of_images = tuple(processor.grid(height, width) for height, width in images)
    tokens = sum(map(math.prod, of_images)) // description.lm.vision.merge**2
    if tokens > length:
        raise UserError(f"{where}: {tokens:,} tokens, in rows of {length:,}; plan longer rows, or fewer pixels")
    return of_images


def row_slots(description: RunDescription) -> int | None:
    """Counts the slots of a training row; None where `config.plan.images` names none and data say it.

    Raises UserError as `grids` does.
    """
    of_images = grids(description, description.config.train.length)
    return count_slots(description.lm.vision, of_images) if of_images else None
