"""Sources of one's own: the least that one is, and one line for what is none."""

import dataclasses
import types

import pytest

from efficientllm import data
from efficientllm.data.corpus import Corpus
from efficientllm.errors import UserError
from efficientllm.registry import register
from efficientllm.train import setup

pytestmark = pytest.mark.quick

TEXTS = [f"document {number} of a few words" for number in range(40)]


@register("data", "least_source")
class Least(data.Source):
    def documents(self):
        yield from TEXTS


@register("data", "stranger_source")
class Stranger:
    """Derived from nothing."""

    def documents(self):
        yield from ((text, text) for text in TEXTS)


@register("data", "odd_source")
@dataclasses.dataclass(frozen=True)
class Odd(data.Source):
    what: str

    streaming = property(lambda self: self.what == "streaming")

    def documents(self):
        yield "a text"
        yield {"number": 5, "list": ["a", "b"], "pair": ("a", 5), "half": "\ud800", "none": None}[self.what]


@register("data", "no_source")
class NoSource:
    pass


@pytest.mark.parametrize("spec", ["least_source", "stranger_source"])
def test_documents_are_enough(spec):
    tokenizer = data.build_tokenizer("bpe(vocab_size=300)", spec)
    summary = data.describe_data(spec, tokenizer)
    assert summary["train_documents"] + summary["held_out_documents"] == 40 and summary["held_out_documents"] > 0
    assert sorted([*Corpus(spec).texts("train"), *Corpus(spec).texts("held_out")]) == sorted(TEXTS)
    batches = data.train_iterator(spec, tokenizer, 2, 16, seed=0)
    assert next(batches)["tokens"].shape == (2, 16)
    batches.close()


@pytest.mark.parametrize(
    "spec, message",
    [
        ("odd_source(what='number')", "document 1 is 5; documents() yields texts, or pairs of a text and its group"),
        ("odd_source(what='list')", "document 1 is ['a', 'b']; documents() yields texts"),
        ("odd_source(what='pair')", "document 1 is ('a', 5); documents() yields texts"),
        ("odd_source(what='none')", "document 1 is None; documents() yields texts"),
        ("odd_source(what='half')", "document 1 holds half of a surrogate pair"),
        ("odd_source(what='streaming')", "only hf(...) can be streamed"),
        ("no_source", "has no documents(); derive it from efficientllm.data.Source"),
    ],
)
def test_what_is_no_source_is_named(spec, message):
    with pytest.raises(UserError) as error:
        data.check_data(spec)
    assert f"data = {spec!r}" in str(error.value) and message in str(error.value)


def test_data_is_read_before_a_checkpoint_is(tmp_path, monkeypatch):
    """Reading one can take a minute and a half: what is wrong with the data is said before."""
    from efficientllm import base_config
    from efficientllm.infer import setup as serving

    monkeypatch.setattr("efficientllm.convert.open_source", lambda *_, **__: pytest.fail("the checkpoint came first"))
    (tmp_path / "bad.jsonl").write_text("{")
    config = base_config.get_config()
    config.model.pretrained, config.data = "smollm2-135m", f"pairs(path='{tmp_path}/bad.jsonl')"
    log = types.SimpleNamespace(info=lambda line: None)
    with pytest.raises(UserError, match="bad.jsonl, line 1: not JSON"):
        setup.prepare(config, log)
    with pytest.raises(UserError, match="bad.jsonl, line 1: not JSON"):
        serving.prepare(config)


def test_rows_to_calibrate_on_hold_no_padding(tmp_path):
    rows = [f'{{"prompt": "question {i}", "response": "{"answer " * (i % 7 + 1)}"}}' for i in range(200)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    spec = f"pairs(path='{tmp_path}/rows.jsonl')"
    calibration_rows = data.calibration_rows(spec, data.build_tokenizer("bytes", spec), 64)
    assert calibration_rows.shape == (data.pipeline.CALIBRATION_ROWS, 64) and (calibration_rows > 0).all()
