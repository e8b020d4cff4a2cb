"""Streamed data sets of the hub, `hf(streaming=True)`, as a grain dataset that can resume where it was."""

import copy
import typing

import grain

from efficientllm.data.corpus import Corpus, shifted
from efficientllm.errors import FieldError


class Stream(grain.IterDataset):
    """Train documents of a streamed `datasets` data set, tokenised as they arrive, epoch after epoch.

    The documents of one process: `datasets` gives each its own shards where their number allows, else its own examples.
    """

    def __init__(self, corpus: Corpus, tokenizer: typing.Any, process_index: int, process_count: int):
        super().__init__()
        self._corpus, self._tokenizer = corpus, tokenizer
        self._process = process_index, process_count

    def __iter__(self):
        return _StreamIterator(self._corpus, self._tokenizer, *self._process)


class _StreamIterator(grain.DatasetIterator):
    def __init__(self, corpus, tokenizer, process_index, process_count):
        from datasets.distributed import split_dataset_by_node

        super().__init__()
        self._corpus, self._tokenizer = corpus, tokenizer
        self._rows = split_dataset_by_node(corpus.source.rows(), process_index, process_count)
        self._texts = None
        self._has_documents = True

    def __next__(self):
        while True:
            if self._texts is None:
                self._texts = self._train_texts()
            for text in self._texts:
                ids = self._tokenizer.encode(text)
                if ids:
                    self._has_documents = True
                    return shifted([*self._tokenizer.lead_ids, *ids, self._tokenizer.eos_id])
            self._next_epoch()

    def get_state(self):
        return copy.deepcopy(self._rows.state_dict())

    def set_state(self, state):
        self._rows.set_epoch(state["epoch"])
        self._rows.load_state_dict(copy.deepcopy(state))
        self._texts, self._has_documents = None, True

    def _train_texts(self):
        texts = self._corpus.source.texts(self._rows, batch_size=1)
        return (text for text in texts if self._corpus.side(text) == "train")

    def _next_epoch(self):
        if not self._has_documents:
            raise FieldError(
                "data",
                "a whole epoch of the stream held no train document; lower held_out, or stream more",
                self._corpus.spec,
            )
        self._rows.set_epoch(self._rows.epoch + 1)
        self._texts, self._has_documents = None, False
