"""Datasets of the Hugging Face hub, or of a folder laid out as one, whole or streamed."""

import dataclasses
import functools
import itertools
import os
import typing

from efficientllm.data import cache, paths, row_readers
from efficientllm.data.base import Example, ImageSource, Picture, blind_document
from efficientllm.data.image_chat import conversation_example
from efficientllm.errors import FieldError, UserError
from efficientllm.registry import register


@register("data", "hf")
@dataclasses.dataclass(frozen=True)
class Hub(ImageSource):
    """`datasets.load_dataset(path, name, split=split)`, of which `field` holds the text.

    With `image`, the name of a column of images, it is a source of pictures (`data.base.ImageSource`): `label` and
    `caption` name the columns of their classes and captions, where there are any. With `messages`, or with `prompt` and
    `response`, it is one of conversations about them (`data.base.ExampleSource`); `image` may hold several each row.

    Streamed, nothing is stored and training reads on without end; what must be known beforehand (the trained
    tokenizer, the held-out text, the fingerprint) then comes from the first `sample` documents.
    """

    path: str
    name: str = ""
    split: str = "train"
    streaming: bool = False
    field: str = "text"
    held_out: float = 0.05
    sample: int = 2000
    image: str = ""
    label: str = ""
    caption: str = ""
    size: int = 256
    buckets: int | tuple = 1
    channels: int = 3
    flip: bool = True
    messages: str = ""
    prompt: str = ""
    response: str = ""
    max_pixels: int = 0

    @property
    def modality(self) -> str:  # type: ignore[override]
        return ("text and images" if self.records else "images") if self.image else "text"

    @property
    def records(self) -> bool:  # type: ignore[override]
        return bool(self.image and (self.messages or self.response))

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the classes, where the data set has them."""
        return tuple(getattr(self.rows().features.get(self.label), "names", None) or ())

    def key(self) -> str | None:
        """Changes with the stored files or a field; None for a stream, which has to be read to be known."""
        if self.streaming:
            return None
        return f"{self} {cache.stat_key(file['filename'] for file in self.rows().cache_files)}"

    def documents(self) -> typing.Iterator[str]:
        """Yields all documents, or the first `sample` of a stream.

        Raises UserError if the data set cannot be reached or has no such field.
        """
        if self.records:
            yield from map(blind_document, self.examples())
        else:
            yield from _sample(self) if self.streaming else self.texts(self.rows())

    def rows(self) -> typing.Any:
        """Loads the `datasets` data set. Raises UserError with the reason if it cannot be loaded."""
        datasets = library()
        if os.path.isdir(self.path):
            _check_json(self.path, cache.stat_key(_json_files(self.path)))
        try:
            return datasets.load_dataset(self.path, self.name or None, split=self.split, streaming=self.streaming)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:  # a script is Runtime's
            raise FieldError(
                "data",
                f"{self._where()} cannot be loaded ({_reason(error)}); check path, name and split, or, without a "
                "network, use python_docs() or files of your own through text(), jsonl(), csv() or parquet()",
            ) from error

    def iterate(self, rows: typing.Any = None, batch_size: int | None = None) -> typing.Iterator[typing.Any]:
        """Yields the rows, or with `batch_size` batches of them as dicts of columns. Raises UserError for data that
        `datasets` cannot read."""
        rows = self.rows() if rows is None else rows
        iterator = iter(rows if batch_size is None else rows.iter(batch_size))
        while True:
            try:
                item = next(iterator, None)
            except (OSError, ValueError, TypeError, library().exceptions.DatasetsError) as error:
                raise FieldError("data", f"{self._where()} cannot be read by `datasets` ({_reason(error)})") from error
            if item is None:
                return
            yield item

    def texts(self, rows: typing.Any, batch_size: int = 64) -> typing.Iterator[str]:
        """Yields the documents among `rows`, read `batch_size` at a time; null and blank ones are none."""
        for batch in self.iterate(rows, batch_size):
            if self.field not in batch:
                raise UserError(row_readers.missing_field(self.field, batch, self._where()))
            for value in batch[self.field]:
                text = row_readers.check_text(value, self.field, self._where())
                if text and not text.isspace():
                    yield text

    def pictures(self) -> typing.Iterator[Picture]:
        """Yields the pictures, whose images are read when they are needed. Raises UserError for a column that is not
        there, or that holds no images."""
        rows, images = self._rows_and_images(self.image, self.label, self.caption)
        for index, (label, caption) in enumerate(self._labels_and_captions(rows)):
            name = f"{self._where()}, row {index}"
            text = row_readers.check_text(caption, self.caption, name) or ""
            yield Picture(functools.partial(self._content, images, index, name), label, text, name=name)

    def examples(self) -> typing.Iterator[Example]:
        """Yields the conversations, whose pictures are read when they are needed. Raises UserError as `pictures`."""
        if self.streaming:
            raise FieldError("data", "streaming = True: conversations about pictures are not streamed; leave it out")
        rows, images = self._rows_and_images(self.image, self.messages, self.prompt, self.response)
        texts = rows.select_columns([name for name in (self.messages, self.prompt, self.response) if name])
        for index, row in enumerate(texts):
            name = f"{self._where()}, row {index}"
            turns = row[self.messages] if self.messages else self._turns(row, name)
            values = images[index][self.image]
            count = len(values) if isinstance(values, list) else 1
            example = conversation_example(turns, [], name)
            contents = tuple(functools.partial(self._content, images, index, name, place) for place in range(count))
            yield example._replace(pictures=contents)

    def _turns(self, row, name):
        """A question about all pictures of a row, and its answer: the first, where a column holds several."""
        answer = row[self.response]
        answer = answer[0] if isinstance(answer, list) and answer else answer
        question = row[self.prompt] if self.prompt else ""
        for column, text in ((self.prompt, question), (self.response, answer)):
            row_readers.check_text(text, column, name)
        return [{"role": "user", "content": question or ""}, {"role": "assistant", "content": answer or ""}]

    def _rows_and_images(self, *columns):
        """The rows, and their images alone, undecoded."""
        rows = self.rows()
        for column in filter(None, columns):
            if column not in rows.column_names:
                raise UserError(row_readers.missing_field(column, rows.column_names, self._where()))
        images, datasets = rows.select_columns([self.image]), library()
        feature, undecoded = rows.features[self.image], datasets.Image(decode=False)
        if isinstance(feature, datasets.Image):
            images = images.cast_column(self.image, undecoded)
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            images = images.cast_column(self.image, datasets.List(undecoded))
        return rows, images

    def _labels_and_captions(self, rows):
        columns = (rows[column] if column else [None] * len(rows) for column in (self.label, self.caption))
        return zip(*columns, strict=True)

    def _content(self, images, index, name, place=0):
        """The bytes of an image of a row, or the path of its file."""
        value = images[index][self.image]
        value = value[place] if isinstance(value, list) else value
        if isinstance(value, dict) and "bytes" in value:
            value = value["bytes"] or value.get("path")
        if not isinstance(value, bytes | str):
            raise UserError(
                f"{name}: field {self.image!r} holds {type(value).__name__}, and no image; name the column of images"
            )
        return value

    def _where(self):
        return f"hf(path={self.path!r}, name={self.name!r}, split={self.split!r})"


def library() -> typing.Any:
    """Imports `datasets` and stops it from importing torch.

    A stream would import torch, a second and 200 MB that count in a run's measurements, to share its epoch number with
    data loader workers, which we do not use.
    """
    import datasets

    datasets.config.TORCH_AVAILABLE = False
    return datasets


def _reason(error):
    """The first line of what went wrong, where `datasets` names a cause of the cause's."""
    return str(error.__cause__ or error).strip().splitlines()[0]


def _json_files(folder):
    try:
        return paths.find_files(folder, (".json", ".jsonl"))
    except UserError:  # a data set of other files
        return []


@functools.lru_cache(maxsize=8)
def _check_json(folder, stats):
    """Refuses JSON that is no rows before `datasets` reads it, whose parser dies of deep nesting with the process."""
    for path in _json_files(folder):
        for _ in row_readers.read_rows(path, "json", None):
            pass


@functools.lru_cache(maxsize=1)
def _sample(source):
    return list(itertools.islice(source.texts(source.rows()), source.sample))
