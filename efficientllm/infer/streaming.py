"""Answers to prompts as texts: where they stop, what is shown while they grow, and the file they are written to."""

import json

from efficientllm.runtime.atomic_write import write_atomically

HALF = "\ufffd"  # what a tokenizer makes of the first bytes of a character


def cut(text, stops):
    """The text up to the first of the stop strings in it."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


class Stream:
    """Shows a growing text with `write`, and nothing that may yet change: half a character, or the start of a stop."""

    def __init__(self, write, stops=()):
        self._write, self._stops, self._shown = write, stops, 0

    def show(self, text, finished=False):
        """`text` is all there is so far."""
        text = cut(text, self._stops)
        if not finished:
            text = text.rstrip(HALF)
            starts = [n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
            text = text[: len(text) - max(starts, default=0)]
        if new := text[self._shown :]:
            self._write(new)
            self._shown = len(text)


class Answers:
    """What a model answers to `texts`, whose ids are `prompts`."""

    def __init__(self, texts, prompts, tokenizer, stops=()):
        self.texts, self.prompts, self._tokenizer, self._stops = texts, prompts, tokenizer, tuple(stops)
        self.ids, self.complete = [[] for _ in texts], [False] * len(texts)
        self._reach = 4 * max(map(len, self._stops), default=0) + 4  # tokens that can hold a stop: bytes, and more

    def generate(self, engine, new_tokens, batch_size, seed, write, chunk=8):
        """Fills in `ids`, `batch_size` prompts at a time; a batch of one is shown as it grows."""
        for first in range(0, len(self.prompts), batch_size):
            rows = range(first, min(first + batch_size, len(self.prompts)))
            streams = [Stream(write, self._stops)] if len(rows) == 1 else []
            prompts = [self.prompts[row] for row in rows]
            for found in engine.generate(prompts, new_tokens, seed, chunk, self._stopped, first):
                self.ids[rows.start : rows.stop] = found
                for stream in streams:
                    stream.show(self._decode(rows.start))
            for row, stream in zip(rows, streams or [Stream(write, self._stops) for _ in rows], strict=True):
                self.complete[row] = True
                stream.show(self._decode(row), finished=True)
                write("\n")

    def _stopped(self, ids):
        return bool(self._stops) and any(stop in self._tokenizer.decode(ids[-self._reach :]) for stop in self._stops)

    def text(self, row):
        """The answer to prompt `row`, without its stop string."""
        return cut(self._decode(row), self._stops)

    def end(self, row):
        """What ended answer `row`: the end token's or the stop string's text, or None for the limit of tokens."""
        if (ids := self.ids[row]) and ids[-1] in self._tokenizer.end_ids:
            return self._tokenizer.text_of(ids[-1])
        whole = self._decode(row)
        return min((stop for stop in self._stops if stop in whole), key=whole.find, default=None)

    def _decode(self, row):
        """The answer's text; the token that ended it may be no special one."""
        ids = self.ids[row]
        return self._tokenizer.decode(ids[:-1] if ids and ids[-1] in self._tokenizer.end_ids else ids)

    def write(self, file):
        """Writes what there is as JSON lines: prompt, answer, tokens, what ended it, and whether it is complete."""
        lines = [
            {"prompt": text, "answer": self.text(row), "tokens": len(self.ids[row]), "end": self.end(row)}
            | {"complete": self.complete[row]}
            for row, text in enumerate(self.texts)
        ]
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
