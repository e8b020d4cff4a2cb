"""ChartQA (Masry et al. 2022, arXiv:2203.10244): questions about charts, from a folder of either of its layouts."""

import dataclasses
import functools
import hashlib
import pathlib
import typing

from efficientllm.data import cache, paths, row_readers
from efficientllm.data.base import Example, ExampleSource, Tally
from efficientllm.errors import FieldError, UserError
from efficientllm.registry import register

SPLITS = ("train", "val", "test")
WRITERS = ("human", "augmented")  # of the questions: people, and a model from a chart's summary
_COLUMNS = ("image", "query", "label", "human_or_machine")


class Question(typing.NamedTuple):
    """A question about a chart, as both layouts have it.

    Attributes:
      picture: the file, or its content.
      chart: what tells charts apart.
      writer: one of WRITERS.
    """

    picture: pathlib.Path | bytes
    chart: str
    text: str
    answer: str
    writer: str
    where: str


@register("data", "chartqa", example="chartqa(path='ChartQA Dataset')")
@dataclasses.dataclass(frozen=True)
class ChartQA(ExampleSource):
    """A folder of ChartQA: the authors' (`train/png`, `train/train_human.json`), or the hub's (`train-*.parquet`).

    Questions about one chart are never divided between training and held-out ones.

    Args:
      path: the folder.
      split: `train`, `val` or `test`.
      writer: `human` or `augmented` questions alone; empty is both.
      prompt: what stands behind a question.
      max_pixels: what charts are shrunk to at most, 0 for the model's own limit.
    """

    path: str
    split: str = "train"
    writer: str = ""
    prompt: str = " Answer the question with a single word."
    held_out: float = 0.05
    max_pixels: int = 0
    tally: Tally = dataclasses.field(default_factory=lambda: Tally("questions"), init=False, repr=False, compare=False)

    def key(self) -> str:
        """Changes when a file of questions does, or a field."""
        return f"{self} {cache.stat_key(self._layout()[1])}"

    def notes(self) -> list[str]:
        return list(self.tally.lines())

    def examples(self) -> typing.Iterator[Example]:
        """Yields a conversation for each question. Raises UserError that names the file and the record."""
        self.tally.reset()
        for question in self.questions():
            self.tally.read += 1
            self.tally.layouts[question.writer] += 1
            content = [{"type": "image"}, {"type": "text", "text": question.text + self.prompt}]
            messages: list[dict[str, typing.Any]] = [
                {"role": "user", "content": content},
                {"role": "assistant", "content": question.answer},
            ]
            name, kinds = question.where, (question.writer,)
            yield Example(messages, (question.picture,), f"chart {question.chart}", name, kinds)

    def questions(self) -> typing.Iterator[Question]:
        """Yields the questions. Raises UserError for a folder of neither layout, and for records without an answer."""
        read, files = self._layout()
        for file in files:
            self.tally.files += 1
            for question in read(file):
                if self.writer in ("", question.writer):
                    yield question

    def _layout(self):
        """`(reader of a file, the files of the split)`."""
        for key, value, names in (("split", self.split, SPLITS), ("writer", self.writer, ("", *WRITERS))):
            if value not in names:
                raise FieldError("data", f"{key} = {value!r}: must be one of {', '.join(filter(None, names))}")
        folder = pathlib.Path(self.path).expanduser()
        for root in (folder, folder / "ChartQA Dataset"):
            files = [root / self.split / f"{self.split}_{writer}.json" for writer in WRITERS]
            if there := [file for file in files if file.is_file()]:
                return functools.partial(_read_original, root / self.split / "png"), list(map(str, there))
        for root in (folder / "data", folder):
            if files := sorted(root.glob(f"{self.split}-*.parquet")):
                return _read_parquet, list(map(str, files))
        paths.find_files(self.path, ())  # raises where there is no such folder
        raise FieldError(
            "data",
            f"path = {self.path!r}: has neither {self.split}/{self.split}_human.json (the authors' layout) nor "
            f"{self.split}-*.parquet (the hub's); name the folder that holds one of them",
        )


def _read_original(pictures, file):
    writer = next(writer for writer in WRITERS if file.endswith(f"_{writer}.json"))
    for where, row in row_readers.read_rows(file, "json", lambda names, where: list(names)):
        name, text, label = (_text(row, key, where) for key in ("imgname", "query", "label"))
        picture = pictures / name
        if not picture.is_file():
            raise UserError(f"{where}: imgname = {name!r}: there is no file {picture}; unpack the charts beside it")
        yield Question(picture, name, text, label, writer, where)


def _read_parquet(file):
    for where, row in row_readers.read_rows(file, "parquet", _columns):
        image, labels, machine = row["image"], row["label"], row["human_or_machine"]
        content = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(content, bytes):
            raise UserError(f"{where}: field 'image' holds {type(image).__name__}, and no bytes of a picture")
        labels = labels if isinstance(labels, list) else [labels]
        if not labels or not isinstance(labels[0], str):
            raise UserError(f"{where}: field 'label' holds {labels!r:.60}; it is a list of answers")
        writer = WRITERS[bool(machine)] if isinstance(machine, int) else WRITERS["human" not in str(machine)]
        chart = hashlib.sha256(content).hexdigest()
        yield Question(content, chart, _text(row, "query", where), labels[0], writer, where)


def _columns(names, where):
    for name in _COLUMNS:
        if name not in names:
            raise UserError(row_readers.missing_field(name, names, where))
    return list(_COLUMNS)


def _text(row, key, where):
    text = row_readers.check_text(row_readers.field_value(row, key, where), key, where)
    if not text or text.isspace():
        raise UserError(f"{where}: field {key!r} is empty")
    return text
