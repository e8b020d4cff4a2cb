"""Small data sets of pictures for tests of samples."""

import dataclasses

from efficientllm.data.images import ImageData

LETTERS = "glyphs(size=16, letters='OI', held_out=0.2)"


def data(folder, spec=LETTERS, **source):
    """An ImageData with a cache of its own; `source` are fields of its source that its spec cannot name."""
    made = ImageData(spec, cache_dir=folder)
    if source:
        made.source = dataclasses.replace(made.source, **source)
    return made
