"""Source, the base class of data sources, and Tally, the count of what a source read and skipped."""

import collections
import dataclasses
import typing


class Source:
    """Base class of data sources. One of your own is a dataclass registered as ("data", name) with `documents()`.

        @register("data", "diary")
        @dataclasses.dataclass(frozen=True)
        class Diary(Source):
            path: str

            def documents(self):
                yield from pathlib.Path(self.path).read_text().split("\\n---\\n")

    Then `--config.data="diary(path='diary.txt')"` with the file in `config.imports`.

    Attributes:
      held_out: the share of documents kept for evaluation, decided by a hash. To make it a key of the spec, declare it
        as a field: `held_out: float = 0.05`.
      streaming: whether training reads on without end. Only a `hf` data set can.
      records: whether a document is a conversation made by `data.conversation.dump`, of which only answers are learnt.
    """

    held_out = 0.05
    streaming = False
    records = False

    def documents(self) -> typing.Iterator[typing.Any]:
        """Yields every document in a fixed order: a text, or `(text, group)`.

        Documents of one group (by default of the same text) are never divided between training and held-out text.
        """
        raise NotImplementedError(f"{type(self).__name__} needs documents(), which yields texts")

    def key(self) -> str | None:
        """A string that changes when the documents do and is cheap to make, or None: all is read at every start."""
        return None

    def notes(self) -> list[str]:
        """Lines for the log about what `documents()` read, once it has ended."""
        return []


@dataclasses.dataclass
class Tally:
    """Counts of one pass over files: what was read, in which layout, and what was skipped and why."""

    unit: str = "documents"
    files: int = 0
    read: int = 0
    layouts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    skipped: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    first: dict = dataclasses.field(default_factory=dict)

    def reset(self) -> None:
        self.files = self.read = 0
        for counts in (self.layouts, self.skipped, self.first):
            counts.clear()

    def skip(self, reason: object, where: str) -> None:
        self.skipped[reason] += 1
        self.first.setdefault(reason, where)

    def lines(self) -> typing.Iterator[str]:
        files = f"{self.files} file" + "s" * (self.files != 1)
        unit = self.unit.removesuffix("s") if self.read == 1 else self.unit
        layouts = "; ".join(name if count == self.read else f"{count} {name}" for name, count in self.layouts.items())
        yield f"read {self.read:,} {unit} of {files}" + (f": {layouts}" if layouts else "")
        for reason, count in self.skipped.items():
            yield f"skipped {count:,}: {reason} (the first: {self.first[reason]})"
