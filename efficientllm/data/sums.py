"""Additions to tune on, whose answers are right or wrong: an unlimited number of records, without a download."""

import dataclasses
import random
import typing

from efficientllm.data import conversation
from efficientllm.data.base import Source
from efficientllm.registry import register

FORMAT = 1  # of the records: raise it with every change of what is drawn or written


@register("data", "sums")
@dataclasses.dataclass(frozen=True)
class Sums(Source):
    """ "318 + 254" with the answer "572": `count` draws of two numbers of `digits` digits.

    A short system message stands in for the long one that some chat templates add, which would be most of the tokens.
    The two orders of a pair, and its repetitions, are on the same side of the split.
    """

    count: int = 20_000
    digits: int = 3
    held_out: float = 0.05

    records = True

    def key(self) -> str:
        """Changes with a field."""
        return f"{self} {FORMAT}"

    def documents(self) -> typing.Iterator[tuple[str, str]]:
        """Yields (conversation as JSON text, the pair in its order by size), the same at every call."""
        draw, least = random.Random(f"sums {self.digits}"), 10 ** (self.digits - 1)
        for _ in range(self.count):
            first, second = (draw.randrange(least, 10 * least) for _ in range(2))
            messages = [
                {"role": "system", "content": "Add."},
                {"role": "user", "content": f"{first} + {second}"},
                {"role": "assistant", "content": str(first + second)},
            ]
            yield conversation.dump(messages), " ".join(map(str, sorted((first, second))))
