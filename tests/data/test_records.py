"""Conversations: what is learnt of them, how they are packed, and what is said of bad records."""

import json

import numpy as np
import pytest

from efficientllm import data
from efficientllm.data import conversation
from efficientllm.data.corpus import Corpus
from efficientllm.data.tokenizers import FastTokenizer
from efficientllm.errors import UserError

pytestmark = pytest.mark.quick

LENGTH = 64


@pytest.fixture
def tokenizer():
    return data.build_tokenizer("bytes", "doc_pairs()")


@pytest.fixture
def records(tmp_path):
    rows = [{"prompt": f"Question {i}?", "response": f"Answer {i}{'.' * (i % 70)}"} for i in range(120)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return f"pairs(path='{tmp_path}/rows.jsonl', held_out=0.2)"


def decode(ids):
    return bytes(int(id) for id in ids if id < 256).decode()


def rows(batch):
    """(tokens, targets, learnt) of every segment of a batch."""
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segments"][row].max() + 1):
            where = batch["segments"][row] == segment
            yield tuple(batch[key][row][where] for key in ("tokens", "targets", "weights"))


def test_only_answers_and_their_end_are_learnt_and_no_record_is_cut_or_crossed(records, tokenizer):
    seen = 0
    for batch in data.eval_batches(records, tokenizer, 4, LENGTH):
        for tokens, targets, learnt in rows(batch):
            prompt, answer = decode(tokens).split("\n\n")
            assert prompt.startswith("Question ") and (answer.startswith("Answer") or len(tokens) == LENGTH)
            answers = targets[learnt > 0]
            if len(tokens) < LENGTH:
                assert decode(answers) == answer and answers[-1] == tokenizer.eos_id
            assert list(targets[:-1]) == list(tokens[1:])
            seen += 1
    assert seen == len(Corpus(records).documents(tokenizer)["held_out"])


def test_training_rows_hold_every_record_and_resume(records, tokenizer):
    iterator = data.train_iterator(records, tokenizer, 4, LENGTH, seed=0)
    first = [next(iterator) for _ in range(3)]
    state = json.loads(json.dumps(iterator.get_state()))
    after = [next(iterator) for _ in range(60)]
    prompts = {decode(tokens).split("\n\n")[0] for batch in first + after for tokens, _, _ in rows(batch)}
    assert len(prompts) == len(Corpus(records).documents(tokenizer)["train"])
    again = data.train_iterator(records, tokenizer, 4, LENGTH, seed=0)
    again.set_state(state)
    for batch in after:
        resumed_batch = next(again)
        assert all(np.array_equal(batch[key], resumed_batch[key]) for key in batch)
    for opened in (iterator, again):
        opened.close()


def test_few_short_records_are_enough_for_long_rows(tmp_path, tokenizer):
    lines = [json.dumps({"prompt": f"Q{i}", "response": f"A{i}"}) for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    spec = f"pairs(path='{tmp_path}/rows.jsonl')"
    (held_out,) = data.eval_batches(spec, tokenizer, 2, 256)
    assert held_out["weights"].sum() == 3 * len(list(Corpus(spec).texts("held_out")))
    iterator = data.train_iterator(spec, tokenizer, 2, 256, seed=0)
    assert next(iterator)["weights"].sum() > 0  # soon: no more is read ahead than there are rows in an epoch
    iterator.close()


def test_records_longer_than_a_row_are_counted(records, tokenizer):
    documents = Corpus(records).documents(tokenizer)["train"]
    lengths = [len(documents[i]["tokens"]) for i in range(len(documents))]
    assert documents.longer_than(LENGTH) == sum(length > LENGTH for length in lengths) > 0


def chat_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"{chr(i)}": i for i in range(33, 127)} | {" ": 0, "\n": 1, "<end>": 127}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens(["<end>"])

    def chat(messages, add_generation_prompt=False):
        turns = "".join(f"[{message['role']}]{message['content']}<end>\n" for message in messages)
        return turns + ("[assistant]" if add_generation_prompt else "")

    return FastTokenizer(backend, 127, 128, chat, "turns")


def test_a_chat_template_frames_the_turns_and_every_answer_is_learnt():
    tokenizer = chat_tokenizer()
    messages = [("system", "S"), ("user", "U1"), ("assistant", "A1"), ("user", "U2"), ("assistant", "A2")]
    text = conversation.dump([{"role": role, "content": content} for role, content in messages])
    ids, learnt = conversation.encode(tokenizer, text)
    spelt = "".join(chr(id) if id > 32 else " \n"[id] for id in ids).replace(chr(127), "|")
    assert spelt == "[system]S|\n[user]U1|\n[assistant]A1|\n[user]U2|\n[assistant]A2|"
    assert "".join(c for c, is_learnt in zip(spelt, learnt, strict=True) if is_learnt) == "A1|A2|"


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<eos>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def templated(tmp_path):
    """A tokenizer of transformers with a template of its own, as a folder."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    saved = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    saved.chat_template = TEMPLATE
    saved.save_pretrained(tmp_path / "templated")
    return tmp_path / "templated"


def test_a_conversation_has_the_ids_that_transformers_gives_it(templated):
    import transformers

    ours = data.build_tokenizer(f"hf(path={str(templated)!r})", "doc_pairs()")
    messages = [("user", "U 1"), ("assistant", "A 1"), ("user", "U 2"), ("assistant", "A 2")]
    messages = [{"role": role, "content": content} for role, content in messages]
    ids, learnt = conversation.encode(ours, conversation.dump(messages))
    theirs = transformers.AutoTokenizer.from_pretrained(templated)
    expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids == expected[: len(ids)] and theirs.decode(expected[len(ids) :]) == "\n"
    answer = theirs.encode("A 1<eos>") + theirs.encode("A 2<eos>")
    assert [id for id, is_learnt in zip(ids, learnt, strict=True) if is_learnt] == answer


def test_a_conversation_that_the_template_refuses_is_named(templated):
    ours = data.build_tokenizer(f"hf(path={str(templated)!r})", "doc_pairs()")
    roles = ("system", "user", "assistant")
    text = conversation.dump([{"role": role, "content": f"I am {role}"} for role in roles])
    with pytest.raises(
        UserError, match=r"refuses a conversation of system, user that begins 'I am sys.*no system here"
    ):
        conversation.encode(ours, text)


def test_a_template_of_a_checkpoint_cannot_reach_python(templated):
    """It is run in the sandbox of transformers."""
    (templated / "chat_template.jinja").write_text("{{ messages.__class__.__base__.__subclasses__() }}")
    ours = data.build_tokenizer(f"hf(path={str(templated)!r})", "doc_pairs()")
    messages = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
    with pytest.raises(UserError, match="chat template fails: SecurityError: .*unsafe"):
        conversation.encode(ours, conversation.dump(messages))


def test_parquet_and_a_hub_s_folder_hold_the_same_records(records, tokenizer, tmp_path, monkeypatch):
    import datasets
    import pyarrow.json
    import pyarrow.parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    pyarrow.parquet.write_table(pyarrow.json.read_json(tmp_path / "rows.jsonl"), tmp_path / "rows.parquet")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "part.jsonl").write_bytes((tmp_path / "rows.jsonl").read_bytes())
    specs = [records, records.replace(".jsonl", ".parquet"), f"pairs(path='{tmp_path}/set', hub=True, held_out=0.2)"]
    assert len(set(specs)) == 3
    texts = [[list(Corpus(spec).texts(side)) for side in ("train", "held_out")] for spec in specs]
    assert texts[0] == texts[1] == texts[2] and len(texts[0][0]) + len(texts[0][1]) == 120


def test_questions_from_the_documentation_stay_with_their_module(tokenizer):
    corpus = Corpus("doc_pairs(max_bytes=200000)")
    sides = {side: [json.loads(text) for text in corpus.texts(side)] for side in ("train", "held_out")}
    modules = {
        side: {turns[0]["content"].partition(".")[0] for turns in conversations}
        for side, conversations in sides.items()
    }
    assert sides["held_out"] and not modules["train"] & modules["held_out"]
    assert all([turn["role"] for turn in turns] == ["user", "assistant"] for turns in sides["train"])


@pytest.mark.parametrize(
    "line, spec, message",
    [
        (
            {"prompt": "a"},
            "pairs",
            "line 2: no layout of a conversation is known with the fields prompt; with 'answer'",
        ),
        ({"prompt": "a", "response": 4}, "pairs", "line 2: field 'response' holds int, not text"),
        ({"prompt": ["a"], "response": "b"}, "pairs", "line 2: field 'prompt', turn 1: is 'a'; a turn is {'role'"),
        ({"messages": "hello"}, "chat", "line 2: field 'messages' holds 'hello'; a conversation is a list"),
        ({"messages": [{"role": "user", "content": "a"}, 3]}, "chat", "line 2: field 'messages', turn 2: is 3; a turn"),
        ({"messages": [{"role": "user"}]}, "chat", "line 2: field 'messages', turn 1: is {'role': 'user'}; a turn"),
        ({"messages": [{"from": "wizard", "value": "a"}]}, "chat", "turn 1: is from 'wizard'; known: human"),
        ({"chosen": "a", "rejected": "b"}, "pairs", "write pairs(path=..., response='chosen')"),
        ([3], "pairs", "line 2: field 'messages', turn 1: is 3"),
        (3, "pairs", "line 2: a JSON object is needed, not int"),
    ],
)
def test_a_bad_record_is_named(line, spec, message, tmp_path, tokenizer):
    good = {
        "pairs": {"prompt": "a", "response": "b"},
        "chat": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    }[spec]
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(line)}\n")
    with pytest.raises(UserError) as error:
        next(iter(data.eval_batches(f"{spec}(path='{tmp_path}/*.jsonl')", tokenizer, 1, 1)))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(tmp_path / "rows.jsonl") in str(error.value)


def test_a_field_that_no_record_has_is_named(records, tokenizer):
    with pytest.raises(UserError, match="rows.jsonl, line 1: no field 'answer'; there are: prompt, response"):
        Corpus(records.replace("held_out", "response='answer', held_out")).documents(tokenizer)


def test_an_answer_of_weight_0_is_read_and_not_learnt(tmp_path, templated, tokenizer):
    messages = [("user", "U1"), ("assistant", "A1"), ("user", "U2"), ("assistant", "A2")]
    messages = [{"role": role, "content": content} for role, content in messages]
    messages[1]["weight"], messages[3]["weight"] = 0, 1
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}))
    (text,) = Corpus(f"chat(path='{tmp_path}/rows.jsonl')").source.documents()
    with_template = data.build_tokenizer(f"hf(path={str(templated)!r})", "doc_pairs()")
    for either in (tokenizer, with_template):
        ids, learnt = conversation.encode(either, text)
        assert either.decode([id for id, is_learnt in zip(ids, learnt, strict=True) if is_learnt]) == "A2"
        assert "A1" in either.decode(ids)
