"""Tuning records: prompts with responses, or conversations, from the user's files or the hub."""

import dataclasses
import typing

from efficientllm.data import record_layouts, row_readers
from efficientllm.data.base import Tally
from efficientllm.data.files import Files
from efficientllm.data.hub import Hub
from efficientllm.data.messages import Skipped
from efficientllm.errors import FieldError
from efficientllm.registry import register


@dataclasses.dataclass(frozen=True)
class Records(Files):
    """`path` names files of JSON, CSV or Parquet rows, or with `hub` a data set of the hub (`name` its configuration),
    of which `split` is read. The layout is recognised by the fields (`data.record_layouts`), unless they are named."""

    tally: Tally = dataclasses.field(default_factory=lambda: Tally("records"), init=False, repr=False, compare=False)
    hub: bool = False
    name: str = ""
    split: str = "train"
    held_out: float = 0.05

    records = True
    endings = row_readers.ENDINGS

    def key(self) -> str | None:
        """Changes when a file or a field does."""
        return f"{self} {self._hub().key()}" if self.hub else super().key()

    def documents(self) -> typing.Iterator[str]:
        """Yields conversations as JSON text. Records without an answer are passed over, and counted.

        Raises UserError naming the file and line for a missing field or one of another type, and where no record is
        left.
        """
        layouts: dict[tuple, record_layouts.Layout] = {}
        for where, row in self._rows():
            row = {"messages": row} if isinstance(row, list) else row
            names = tuple(row)
            try:
                layout = layouts.get(names) or layouts.setdefault(names, self._layout(names, where))
                text = layout.document(row, where)
            except Skipped as reason:
                self.tally.skip(f"records {reason}", where)
                continue
            self.tally.read += 1
            self.tally.layouts[layout.name] += 1
            yield text
        if not self.tally.read:
            reasons = "; ".join(list(self.tally.lines())[1:]) or "there is none"
            raise FieldError("data", f"path = {self.path!r}: no record to learn from: {reasons}")

    def _layout(self, names, where):
        return record_layouts.recognise(names, where, self._wanted(), getattr(self, "system", ""))

    def _hub(self):
        return Hub(self.path, name=self.name, split=self.split, held_out=self.held_out)

    def _rows(self):
        if self.hub:
            self.tally.reset()
            self.tally.files = 1
            for index, row in enumerate(self._hub().iterate(), 1):
                yield f"{self.path}, record {index}", row
            return
        for path in self._files():
            yield from row_readers.read_rows(path, "json", self._columns)

    def _columns(self, names, where):
        return [name for name in self._layout(names, where).columns if name in names]


@register("data", "pairs")
@dataclasses.dataclass(frozen=True)
class Pairs(Records):
    """A prompt and a response a record, of the layouts that are known, or in the fields `prompt` and `response`; with
    `system`, a system message ahead of each that has none."""

    prompt: str = ""
    response: str = ""
    system: str = ""

    def _wanted(self):
        return (self.prompt, self.response)


@register("data", "chat")
@dataclasses.dataclass(frozen=True)
class Chat(Records):
    """A conversation a record, of the layouts that are known, or in the field `messages`: turns with `role` and
    `content`, or `from` and `value`."""

    messages: str = ""

    def _wanted(self):
        return (self.messages,)
