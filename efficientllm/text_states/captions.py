"""Text states of the captions that a model trains on: each encoded once, and read from its file when a row needs it."""

import functools
import logging
from collections.abc import Sequence

import numpy as np

from efficientllm.runtime import stopping
from efficientllm.runtime.log import Countdown
from efficientllm.text_states.sources import PromptStates

BYTES = 2**30  # of states in memory, while captions are encoded and of rows read before
log = logging.getLogger("efficientllm")


class CaptionStates:
    """States of captions by their texts, `{"text": float32 [S, E], "pooled": float32 [P]}`; some have no `pooled`.

    Args:
      source: where states come from (`sources`).
      spec: that of the source, for a run's record.
    """

    def __init__(self, source: PromptStates, spec: str):
        self.source, self.spec = source, spec

    def prepare(self, captions: Sequence[str]) -> None:
        """Encodes captions that are in no cache, and the empty text, some at a time.

        Raises UserError for captions that have no states, such as those longer than an encoder reads.
        """
        distinct = list(dict.fromkeys([*captions, ""]))
        self.source.check(distinct)
        new = self.source.uncached(distinct)
        if not new:
            return
        rows = self._rows_in_memory()
        countdown = Countdown(f"text states of {len(new):,} captions", -(-len(new) // rows))
        for first in range(0, len(new), rows):
            stopping.raise_if_stopped()
            self.source.encode(new[first : first + rows])
            countdown.add()

    def __getitem__(self, caption: str) -> dict[str, np.ndarray]:
        """The states of a caption that is prepared; the last ones stay in memory."""
        return self._recent(caption)

    @functools.cached_property
    def _recent(self):
        return functools.lru_cache(self._rows_in_memory())(self._read)

    def _read(self, caption):
        text_BSE, pooled_BE = self.source.encode([caption])
        states = {"text": np.asarray(text_BSE[0], np.float32)}
        return states if pooled_BE is None else states | {"pooled": np.asarray(pooled_BE[0], np.float32)}

    def _rows_in_memory(self):
        tokens, width, pooled = self.source.shape([""])
        return max(1, BYTES // (4 * (tokens * width + pooled)))
