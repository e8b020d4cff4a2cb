"""Questions about pictures as documents of the lm-evaluation-harness, and how their answers are judged.

A task is a yaml file (`tasks/charts.yaml`) whose `custom_dataset`, `doc_to_image` and `process_results` are these. It
asks about the held-out examples of a data spec, each question by itself, with all pictures of the example.

`pictures` are `shown`, or a control that says what can be answered without seeing: `blank` pictures of the same size,
or those of `other` examples.
"""

import typing

from efficientllm.data.base import Example, ExampleSource, blind_document
from efficientllm.data.corpus import Corpus
from efficientllm.errors import UserError

PICTURES = ("shown", "blank", "other")
TOLERANCE = 0.05  # of relaxed accuracy (arXiv:2203.10244, Section 5.1)
Document = dict[str, typing.Any]


def documents(data: str, pictures: str = "shown", **metadata: typing.Any) -> typing.Any:
    """Builds the `datasets.DatasetDict` of a task, `test` alone. Raises UserError for a spec without questions."""
    import datasets

    if pictures not in PICTURES:
        raise UserError(f"pictures = {pictures!r}: must be one of {', '.join(PICTURES)}")
    corpus = Corpus(data)
    if not isinstance(corpus.source, ExampleSource):
        raise UserError(f"data = {data!r}: has no conversations about pictures; name a source such as charts()")
    examples = [example for example in corpus.source.examples() if _is_held_out(corpus, example)]
    rows = [row for place, example in enumerate(examples) for row in _rows(example, _other(examples, place), pictures)]
    if not rows:
        raise UserError(f"data = {data!r}: no held-out question about a picture; raise held_out")
    features = {name: datasets.Value("string") for name in ("question", "answer", "kind", "pictures")}
    features["images"] = datasets.List(datasets.Image())
    return datasets.DatasetDict(test=datasets.Dataset.from_list(rows, features=datasets.Features(features)))


def _is_held_out(corpus, example):
    return bool(example.pictures) and corpus.side(blind_document(example)[1]) == "held_out"


def _other(examples, place):
    """The next example with as many pictures."""
    rest = examples[place + 1 :] + examples[:place]
    return next((other for other in rest if len(other.pictures) == len(examples[place].pictures)), examples[place])


def _rows(example: Example, other: Example, pictures: str) -> typing.Iterator[Document]:
    contents = (other if pictures == "other" else example).pictures
    images = [_file(content() if callable(content) else content) for content in contents]
    turns = example.messages
    answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant" and turn["content"]]
    kinds = example.kinds or ("",) * len(answers)
    for place, kind in zip(answers, kinds, strict=True):
        asked = turns[place - 1]["content"] if place else ""
        text = asked if isinstance(asked, str) else "".join(part.get("text", "") for part in asked)
        question = "<image>" * len(images) + text.replace("<image>", "")
        yield {
            "question": question,
            "answer": turns[place]["content"],
            "kind": kind,
            "images": images,
            "pictures": pictures,
        }


def _file(content):
    return {"bytes": content, "path": None} if isinstance(content, bytes) else {"bytes": None, "path": str(content)}


def images(document: Document) -> list:
    """Returns the pictures of a document, PIL images; grey ones where they are `blank`."""
    if document["pictures"] != "blank":
        return document["images"]
    from PIL import Image

    return [Image.new("RGB", image.size, (128, 128, 128)) for image in document["images"]]


def judge(document: Document, results: list[str]) -> dict[str, float]:
    """Returns `strict` and `relaxed` accuracy of an answer, and both again by the kind of its question."""
    answer, gold = results[0].strip(), document["answer"].strip()
    scores = {"strict": float(answer == gold), "relaxed": float(is_relaxed_match(answer, gold))}
    kind = document["kind"]
    return scores | ({f"{name}_{kind}": score for name, score in scores.items()} if kind else {})


def is_relaxed_match(answer: str, gold: str) -> bool:
    """Whether an answer is right within 5 % of a number, or equal to a text without regard to case.

    "12%" is 0.12. The rule of Qwen-VL and lmms-eval; lm-eval's chartqa has another.
    """
    number, target = _number(answer), _number(gold)
    if number is not None and target:
        return abs(number - target) / abs(target) <= TOLERANCE
    return answer.strip().lower() == gold.strip().lower()


def _number(text):
    text = text.strip()
    try:
        return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
