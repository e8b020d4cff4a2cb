"""Question-answer pairs from the Python documentation and library, for tuning without a download."""

import ast
import dataclasses
import typing

from efficientllm.data import conversation, python_docs
from efficientllm.registry import register


@register("data", "doc_pairs")
@dataclasses.dataclass(frozen=True)
class DocPairs(python_docs.PythonText):
    """ "What does json.dumps(obj, ...) do?" with its docstring, and language topics with their text.

    All records of a module go to the same side of the split.
    """

    max_bytes: int = 2_000_000

    records = True

    def documents(self) -> typing.Iterator[tuple[str, str]]:
        """Yields (conversation as JSON text, what decides its side of the split) in a fixed order."""
        size = 0
        for question, answer, group in _pairs():
            text = conversation.dump([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
            size += len(text.encode())
            if size > self.max_bytes:
                return
            yield text, group


def _pairs():
    """Modules in an order of their own, so that a cap on bytes keeps a sample of all of them."""
    for path in sorted(python_docs._modules(), key=lambda path: python_docs._rank(path.name)):
        source = path.read_text(encoding="utf-8")
        for text in python_docs._docstrings(ast.parse(source), python_docs._module_name(path)):
            name, _, answer = text.partition("\n\n")
            yield f"What does `{name}` do?", answer, source
    for topic in python_docs._topics():
        name = topic.strip().partition("\n")[0].strip()
        yield f"Explain this topic of the Python language: {name}", topic, topic
