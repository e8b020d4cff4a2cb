"""Streamed completions: detokenized text, stop strings, and the JSON lines file."""

import json
import pathlib
import typing
from collections.abc import Callable, Sequence

from efficientllm.infer.engine import Engine
from efficientllm.runtime.atomic_write import write_atomically

HALF = "\ufffd"  # a tokenizer decodes an incomplete UTF-8 character to this


def cut(text: str, stops: Sequence[str]) -> str:
    """Truncates a text at its first stop string."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


class Stream:
    """Writes a growing text; holds back an incomplete character or a possible beginning of a stop string."""

    def __init__(self, write: Callable[[str], typing.Any], stops: Sequence[str] = ()) -> None:
        self._write, self._stops, self._shown = write, stops, 0

    def show(self, text: str, finished: bool = False) -> None:
        """Writes what is new in `text`, the whole text so far."""
        text = cut(text, self._stops)
        if not finished:
            text = text.rstrip(HALF)
            starts = [n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
            text = text[: len(text) - max(starts, default=0)]
        if new := text[self._shown :]:
            self._write(new)
            self._shown = len(text)


class Answers:
    """Completions of the prompts `texts`, whose ids are `prompts`."""

    def __init__(
        self, texts: Sequence[str], prompts: Sequence[Sequence[int]], tokenizer: typing.Any, stops: Sequence[str] = ()
    ) -> None:
        self.texts, self.prompts, self._tokenizer, self._stops = texts, prompts, tokenizer, tuple(stops)
        self.ids: list[list[int]] = [[] for _ in texts]
        self.complete = [False] * len(texts)
        self._reach = (
            4 * max(map(len, self._stops), default=0) + 4
        )  # tokens to search for a stop string: up to 4 a character

    def generate(
        self,
        engine: Engine,
        new_tokens: int,
        batch_size: int,
        seed: int,
        write: Callable[[str], typing.Any],
        chunk: int = 8,
    ) -> None:
        """Generates `batch_size` prompts at a time and sets `ids`; a batch of one is streamed to `write`."""
        for first in range(0, len(self.prompts), batch_size):
            rows = range(first, min(first + batch_size, len(self.prompts)))
            streams = [Stream(write, self._stops)] if len(rows) == 1 else []
            prompts = [self.prompts[row] for row in rows]
            for new_ids in engine.generate(prompts, new_tokens, seed, chunk, self._stopped, first):
                self.ids[rows.start : rows.stop] = new_ids
                for stream in streams:
                    stream.show(self._decode(rows.start))
            for row, stream in zip(rows, streams or [Stream(write, self._stops) for _ in rows], strict=True):
                self.complete[row] = True
                stream.show(self._decode(row), finished=True)
                write("\n")

    def _stopped(self, ids):
        return bool(self._stops) and any(stop in self._tokenizer.decode(ids[-self._reach :]) for stop in self._stops)

    def text(self, row: int) -> str:
        """The completion of prompt `row`, without its stop string."""
        return cut(self._decode(row), self._stops)

    def end(self, row: int) -> str | None:
        """The text of the end token or stop string that ended `row`; None for the limit of tokens."""
        if (ids := self.ids[row]) and ids[-1] in self._tokenizer.end_ids:
            return self._tokenizer.text_of(ids[-1])
        whole = self._decode(row)
        return min((stop for stop in self._stops if stop in whole), key=whole.find, default=None)

    def _decode(self, row):
        """The text without its end token, which may be an ordinary token that `decode` would show."""
        ids = self.ids[row]
        return self._tokenizer.decode(ids[:-1] if ids and ids[-1] in self._tokenizer.end_ids else ids)

    def write(self, file: pathlib.Path) -> None:
        """Writes JSON lines: prompt, answer, number of tokens, what ended it, and whether it is complete."""
        lines = [
            {"prompt": text, "answer": self.text(row), "tokens": len(self.ids[row]), "end": self.end(row)}
            | {"complete": self.complete[row]}
            for row, text in enumerate(self.texts)
        ]
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
