"""Questions about the pictures of an image source, whose labels or captions are the answers."""

import dataclasses
import typing

from efficientllm.data.base import Example, ExampleSource, ImageSource
from efficientllm.errors import FieldError
from efficientllm.registry import build, register


@register("data", "asked", example="asked(of='digits(size=16)')")
@dataclasses.dataclass(frozen=True)
class Asked(ExampleSource):
    """One question about each picture of `of`; the answer is its class's name, or its caption.

    Args:
      of: a data spec of pictures, such as 'digits(size=16)' or 'images(path=...)'.
      question: what is asked of every picture.
    """

    of: str
    question: str = "What is shown?"
    held_out: float = 0.05
    max_pixels: int = 0

    @property
    def _source(self) -> ImageSource:
        source = build("data", self.of, where="config.data")
        if not isinstance(source, ImageSource) or source.frames:
            raise FieldError("data", f"of = {self.of!r}: has no still pictures; name a source such as digits()")
        return source

    def key(self) -> str | None:
        """Changes with the pictures or a field."""
        key = self._source.key()
        return None if key is None else f"{self} {key}"

    def notes(self) -> list[str]:
        return list(self._source.notes())

    def examples(self) -> typing.Iterator[Example]:
        """Yields an example of each picture. Raises UserError for one without a label and a caption."""
        source = self._source
        for place, picture in enumerate(source.pictures()):
            answer = picture.caption or _class_name(source, picture.label)
            name = picture.name or f"picture {place}"
            if not answer:
                raise FieldError("data", f"of = {self.of!r}: {name} has neither a class nor a caption to ask for")
            question = [{"type": "image"}, {"type": "text", "text": self.question}]
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            yield Example(messages, (picture.content,), picture.group or f"{self.of} {name}", name)


def _class_name(source, label):
    return source.classes[label] if isinstance(label, int) and label < len(source.classes) else str(label or "")
