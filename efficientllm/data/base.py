"""Source, ImageSource and ExampleSource, the base classes of data sources; Tally counts what one read and skipped."""

import collections
import dataclasses
import json
import typing

import numpy as np

from efficientllm import registry
from efficientllm.typing import PathLike

if typing.TYPE_CHECKING:
    import PIL.Image


class Source:
    """Base class of data sources, as it stands of text. (`convert.Source` is a checkpoint.) One of your own is a
    dataclass registered as ("data", name) with `documents()`.

        @register("data", "diary")
        @dataclasses.dataclass(frozen=True)
        class Diary(Source):
            path: str

            def documents(self):
                yield from pathlib.Path(self.path).read_text().split("\\n---\\n")

    Then `--config.data="diary(path='diary.txt')"` with the file in `config.imports`.

    Attributes:
      modality: what is read, "text" or "images"; an objective reads one of them.
      held_out: the share of documents kept for evaluation, decided by a hash. To make it a key of the spec, declare it
        as a field: `held_out: float = 0.05`.
      streaming: whether training reads on without end. Only a `hf` data set can.
      records: whether a document is a conversation made by `data.conversation.dump`, of which only answers are learnt.
    """

    modality = "text"
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


MAX_IMAGE_BYTES = 1 << 28  # of a file; a larger one is not read
Content = typing.Union[bytes, np.ndarray, "PIL.Image.Image", PathLike]


class Picture(typing.NamedTuple):
    """A picture of an ImageSource, with what is known of it.

    Attributes:
      content: the bytes of an image file, a uint8 array `[h, w]` or `[h, w, 1 | 3 | 4]`, a `PIL.Image.Image`, a path,
        or a function without arguments that returns one of these. A path and a function are read when they are
        needed, and again in data sets that are too large to be cached decoded.
      label: the class, by name or by number from 0. All pictures of a source have one, or none has.
      caption: text that describes the picture.
      group: pictures of one group are never divided between training and held-out pictures; None: those of the same
        content.
      name: what messages call the picture; empty: its path, or its place in the source.
    """

    content: Content | typing.Callable[[], Content]
    label: str | int | None = None
    caption: str = ""
    group: str | None = None
    name: str = ""


class ImageSource(Source):
    """Base class of data sources of images. One of your own is a dataclass registered as ("data", name) with
    `pictures()`.

        @register("data", "slides")
        @dataclasses.dataclass(frozen=True)
        class Slides(ImageSource):
            path: str
            size: int = 64

            def pictures(self):
                for file in sorted(pathlib.Path(self.path).glob("*/*.png")):
                    yield Picture(file, label=file.parent.name)

    Then `--config.data="slides(path='scans', size=64)"` with the file in `config.imports`. Pictures are decoded,
    cropped to squares and split into training and held-out ones by `data.images.ImageData`.

    Attributes:
      size: height and width in pixels of what is trained on.
      buckets: how many aspect ratios from 1:2 to 2:1 there are, of about the area of `size` squared (1: squares), or
        their sizes, `((height, width), ...)`, in the place of `size` (`data.images.buckets`).
      channels: 3 for RGB, 1 for gray.
      frames: of a clip; 0 where the source is of pictures. A clip's `content` is the bytes or the path of a moving
        picture or a video, or a uint8 array `[F, h, w]` or `[F, h, w, 1 | 3 | 4]`.
      shorter: frame counts below `frames`, for clips of fewer frames, which are skipped otherwise.
      stride: every how many frames one is taken.
      flip: whether half of the training pictures, chosen at random, are mirrored left to right.
      classes: names of the classes in the order of their numbers; none: the labels, sorted.

    `held_out`, `key` and `notes` are those of Source. Attributes that are declared as fields are keys of the spec.
    """

    modality = "images"
    size = 32
    buckets = typing.cast(int | tuple, 1)
    channels = 3
    frames = 0
    shorter = typing.cast(tuple[int, ...], ())
    stride = 1
    flip = False
    classes = typing.cast(tuple[str, ...], ())

    def pictures(self) -> typing.Iterator[Picture]:
        """Yields every picture in a fixed order."""
        raise NotImplementedError(f"{type(self).__name__} needs pictures(), which yields Picture(content, label=...)")


class Example(typing.NamedTuple):
    """A conversation about pictures.

    Attributes:
      messages: in transformers' format; the content of a user's turn is a text or a list of parts, in which
        `{"type": "image"}` stands for the next of `pictures`. Answers are texts.
      pictures: as `Picture.content`.
      group: examples of one group are never divided between training and held-out ones; empty: those of one text.
      name: what messages call the example; empty: its place in the source.
      kinds: of its questions, in order, by which their answers are judged apart; empty: they are not.
    """

    messages: list[dict[str, typing.Any]]
    pictures: tuple[Content | typing.Callable[[], Content], ...] = ()
    group: str = ""
    name: str = ""
    kinds: tuple[str, ...] = ()


class ExampleSource(Source):
    """Base class of data sources of conversations about pictures. One of your own is a dataclass registered as
    ("data", name) with `examples()`.

    A model that reads text alone learns from the same conversations without their pictures, which says what can be
    answered blindly.

    Attributes:
      max_pixels: what pictures are shrunk to at most where the model takes any size; 0 is its processor's own limit.
    """

    modality = "text and images"
    records = True
    max_pixels = 0

    def examples(self) -> typing.Iterator[Example]:
        """Yields every example in a fixed order."""
        raise NotImplementedError(f"{type(self).__name__} needs examples(), which yields Example(messages, pictures)")

    def documents(self) -> typing.Iterator[tuple[str, str]]:
        """Yields the conversations without their pictures, and what decides their side of the split."""
        return map(blind_document, self.examples())


def blind_document(example: Example) -> tuple[str, str]:
    """Returns the conversation without its pictures as a text, and what decides its side of the split."""
    text = json.dumps([message | {"content": _text_of(message["content"])} for message in example.messages])
    return text, example.group or text


def _text_of(content):
    """The text of a message's content, which may be a list of parts."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def modality(spec: str) -> str:
    """What the source of a data spec reads, "text", "images" or "text and images"; it reads nothing yet.

    Raises UserError for a spec that names no source.
    """
    return getattr(registry.build("data", spec, where="config.data"), "modality", Source.modality)


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
        yield from self.skips()

    def skips(self) -> typing.Iterator[str]:
        for reason, count in self.skipped.items():
            yield f"skipped {count:,}: {reason} (the first: {self.first[reason]})"
