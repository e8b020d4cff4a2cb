"""Prompts from files, their ids, and what ended an answer."""

import json

import pytest

from data import kinds
from efficientllm.errors import UserError
from efficientllm.infer import prompts
from efficientllm.infer.streaming import Answers

pytestmark = pytest.mark.quick

ODD = ["a\u2028b", "c\u0085d\u2029e", "f\x0bg\x0ch\x1ci", "\u00e9 \U0001f469", " spaces "]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_ends_at_its_end_alone(tmp_path, mark, end):
    """Not at characters that Unicode calls separators of lines, which JSON and texts hold."""
    (tmp_path / "p.txt").write_bytes((mark + end.join([*ODD, ""])).encode())
    (tmp_path / "p.jsonl").write_bytes(
        (mark + end.join(json.dumps({"prompt": text}, ensure_ascii=False) for text in ODD)).encode()
    )
    assert prompts.read((str(tmp_path / "p.txt"),)) == ODD
    assert prompts.read((str(tmp_path / "p.jsonl"),)) == ODD


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": 5}', r"line 2: 'prompt' = 5: must be a text"),
        ('{"prompt": null}', r"line 2: 'prompt' = None: must be a text"),
        ('{"prompt": ["a"]}', r"line 2: 'prompt' = \['a'\]: must be a text"),
        ('{"prompt": "\\ud800"}', "line 2: .*lone surrogate"),
        ('{"text": "a"}', "line 2: every line must be a JSON object with 'prompt'"),
        ('"a"', "line 2: every line must be a JSON object with 'prompt'"),
        ("3", "line 2: every line must be a JSON object with 'prompt'"),
        ("{", "line 2: every line must be a JSON object with 'prompt'"),
        ("[" * 100_000, "line 2: "),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(UserError, match=message) as error:
        prompts.read((str(tmp_path / "p.jsonl"),))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [(3,), (None,), ("a", 3), ("\ud800",)])
def test_what_is_no_text_is_named(value):
    with pytest.raises(UserError, match="config.infer.prompts: prompt"):
        prompts.read(value)


def test_one_text_is_one_prompt():
    assert prompts.read("hello") == ["hello"]


@pytest.fixture
def tokenizers(tmp_path):
    theirs = kinds.save(tmp_path, bos="<s>", adds_bos=True, eos_token="<eos>", pad_token="<eos>", add=["<|end|>"])
    ends = [theirs.eos_token_id, theirs.convert_tokens_to_ids("<|end|>")]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return kinds.ours(tmp_path), theirs


def test_raw_prompts_are_read_as_transformers_reads_them(tokenizers):
    ours, theirs = tokenizers
    texts = ["the cat", "the<eos>cat<|end|>", ""]
    assert prompts.encode(texts, ours, False) == [theirs(text)["input_ids"] for text in texts]


def test_a_beginning_that_is_spelt_besides_is_said(tokenizers, monkeypatch):
    (ours, theirs), notes = tokenizers, []
    monkeypatch.setattr(prompts.log, "warning", notes.append)
    assert prompts.encode(["a", "<s>a"], ours, False)[1] == theirs("<s>a")["input_ids"]
    assert notes == ["prompt 1 spells <s>, which the tokenizer puts before it: it is there twice"]


def test_an_answer_says_what_ended_it(tokenizers, tmp_path):
    ours, theirs = tokenizers
    answers = Answers(["a"] * 4, [[1]] * 4, ours, ["!"])
    answers.ids = [theirs.encode(text, add_special_tokens=False) for text in ("x<eos>", "x<|end|>", "x! y", "x")]
    assert [answers.end(row) for row in range(4)] == ["<eos>", "<|end|>", "!", None]
    assert [answers.text(row) for row in range(4)] == ["x"] * 4
    answers.write(tmp_path / "samples" / "generated.jsonl")
    lines = (tmp_path / "samples" / "generated.jsonl").read_text().splitlines()
    assert [json.loads(line)["end"] for line in lines] == ["<eos>", "<|end|>", "!", None]


def test_eos_that_also_pads_is_learnt(tokenizers):
    """Labels of padding are masked elsewhere, and a model whose eos pads then never learns to stop."""
    from efficientllm.data import conversation

    ours, theirs = tokenizers
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids, learnt = conversation.encode(ours, conversation.dump(messages))
    assert ids[-1] == theirs.pad_token_id and learnt[-1]
