"""Texts of transformers' tokenizers are the ids that transformers gives them, and end where its `generate` ends."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken

from data import kinds
from data.test_tokenizers import ODD
from efficientllm import data
from efficientllm.data.corpus import Corpus
from efficientllm.errors import UserError
from efficientllm.objectives.next_token import token_bytes

pytestmark = pytest.mark.quick

# What is published: how a family's tokenizer opens a text, and what it adds to a vocabulary.
KINDS = {
    "llama3": {"bos": "<|begin_of_text|>", "adds_bos": True, "eos_token": "<|eot_id|>"},
    "llama2": {"kind": "sentencepiece", "bos": "<s>", "adds_bos": True, "eos_token": "</s>", "unk_token": "<unk>"},
    "qwen2": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "neox": {"bos": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "phi3": {
        "kind": "sentencepiece",
        "bos": "<s>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "add": [AddedToken("<|end|>", rstrip=True, special=True), AddedToken("<|user|>", rstrip=True, special=True)],
    },
    "words": {
        "eos_token": "<eos>",
        "add": [
            AddedToken("<think>", special=False),
            AddedToken("cat", single_word=True),
            AddedToken("[x]", lstrip=True, rstrip=True),
        ],
    },
}
SPELT = [
    "<|eot_id|> a <|im_end|>\n b",
    "<s>the cat</s>",
    "a <think> b </think>",
    "cats cat  [x]  cat",
    "<|end|>\n<|user|> x",
]


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    theirs = kinds.save(folder, **KINDS[request.param])
    return kinds.ours(folder), theirs


@pytest.mark.parametrize("text", [*ODD, *SPELT])
def test_a_prompt_has_the_ids_and_an_answer_the_text_of_transformers(both, text):
    ours, theirs = both
    ids = theirs(text)["input_ids"]
    assert ours.encode_prompt(text) == ids
    assert ours.encode_template(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_a_document_opens_with_what_transformers_puts_before_a_text(both, tmp_path, cache_dir):
    ours, theirs = both
    texts = ["the cat", "a dog", "the mat is on the cat"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = Corpus(f"jsonl(path='{tmp_path}/texts.jsonl', held_out=0.4)", cache_dir)
    sides = corpus.documents(ours)
    ids = [side[index] for side in sides.values() for index in range(len(side))]
    whole = sorted([*document["tokens"], document["targets"][-1]] for document in ids)
    assert whole == sorted([*theirs(text)["input_ids"], theirs.eos_token_id] for text in texts)


def test_a_record_without_a_template_opens_likewise(both):
    from efficientllm.data import conversation

    ours, theirs = both
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    ids, learnt = conversation.encode(ours, conversation.dump(turns))
    assert ids == [*theirs("the cat\n\n")["input_ids"], *ours.encode("sat"), theirs.eos_token_id]
    assert not any(learnt[: len(theirs("the cat\n\n")["input_ids"])])


@pytest.mark.parametrize(
    "generation, config, ends",
    [
        ({"eos_token_id": [256, 258]}, {"eos_token_id": 256}, (256, 258)),
        ({"eos_token_id": 257}, {"eos_token_id": [256, 258]}, (257,)),
        (None, {"eos_token_id": [256, 258]}, (256, 258)),
        ({"temperature": 1.0}, {"eos_token_id": [258]}, (258,)),
        (None, {"eos_token_id": None}, None),
        (None, None, None),
    ],
)
def test_generation_stops_at_any_of_the_tokens_that_the_files_name(generation, config, ends, tmp_path):
    theirs = kinds.save(tmp_path, eos_token="<eos>")
    for name, fields in (("generation_config.json", generation), ("config.json", config)):
        if fields is not None:
            (tmp_path / name).write_text(json.dumps({"model_type": "llama"} | fields))
    assert kinds.ours(tmp_path).end_ids == (ends or (theirs.eos_token_id,))


@pytest.mark.parametrize("value", ["</s>", [1, "2"], 1.5, True, {"a": 1}])
def test_ends_that_are_no_ids_are_refused_by_name(value, tmp_path):
    kinds.save(tmp_path, eos_token="<eos>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id = .* must be a token's id"):
        kinds.ours(tmp_path)


def holes(folder):
    """A tokenizer whose <eos> has an id far behind its other tokens."""
    kinds.save(folder, eos_token="<eos>")
    state = json.loads((folder / "tokenizer.json").read_text())
    assert [token["content"] for token in state["added_tokens"]] == ["<eos>"]
    state["added_tokens"][0]["id"] = state["model"]["vocab"]["<eos>"] = 1000
    (folder / "tokenizer.json").write_text(json.dumps(state))


def test_ids_may_have_holes(tmp_path):
    holes(tmp_path)
    ours = kinds.ours(tmp_path)
    assert (ours.eos_id, ours.vocab_size, len(ours.token_bytes)) == (1000, 1001, 1001)
    ids = ours.encode_prompt("the cat<eos>")
    assert ids[-1] == 1000 and ours.token_bytes[ids].sum() == len("the cat") and ours.decode(ids) == "the cat"


@pytest.mark.parametrize("kept_ids", ["tokenizer.json", "vocab.json"])
def test_an_id_that_would_be_numbered_anew_is_refused_by_name(kept_ids, tmp_path):
    """Of a token behind a hole that no vocabulary holds."""
    kinds.save(tmp_path, eos_token="<eos>")
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    token = state["added_tokens"][0]
    size = token.pop("id")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(state["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("".join(f"{' '.join(pair)}\n" for pair in state["model"]["merges"]))
    for id in (size, 1000):
        added = state | {"added_tokens": [token | {"id": id}]}
        (tmp_path / "tokenizer.json").write_text(json.dumps(added, indent=2))
        if kept_ids == "vocab.json":
            (tmp_path / "tokenizer.json").unlink()
            changed = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": {str(id): token}}
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | changed))
        if id == size:
            assert kinds.ours(tmp_path).eos_id == size
    with pytest.raises(UserError, match=rf"'<eos>' has the id 1000 in its files and {size} as transformers reads them"):
        kinds.ours(tmp_path)


def test_an_added_token_beyond_the_embedding_is_refused_where_a_text_asks_for_it(tmp_path):
    theirs = kinds.save(tmp_path, eos_token="<eos>", pad_token="[PAD]")
    ours = kinds.ours(tmp_path)
    size = theirs.pad_token_id
    assert ours.vocab_size == size + 1
    ours = ours.within(size)
    assert ours.vocab_size == len(ours.token_bytes) == size
    assert ours.encode_prompt("the cat") == theirs("the cat")["input_ids"]
    assert ours.encode("[PAD]") and max(ours.encode("[PAD]")) < size  # a document's is text
    with pytest.raises(UserError, match=rf"'\[PAD\]', whose id {size} lies beyond the model's embedding of {size}"):
        ours.encode_prompt("the [PAD]")


def test_a_model_without_an_embedding_of_pad_is_served(tmp_path):
    from configs import base
    from convert import folders
    from efficientllm.run_description import describe_run

    theirs = kinds.save(tmp_path, eos_token="<eos>", pad_token="[PAD]")
    folders.llama(tmp_path, vocab_size=theirs.pad_token_id)
    config = base.get_config()
    config.model.pretrained, config.tokenizer = str(tmp_path), "pretrained"
    run = describe_run(config)
    lm, tokenizer = run.lm, run.tokenizer
    assert lm.vocab_size == tokenizer.vocab_size == theirs.pad_token_id
    assert len(token_bytes(tokenizer, lm)) == lm.vocab_size


def test_a_vocabulary_that_is_too_large_stays_so(tmp_path):
    kinds.save(tmp_path, eos_token="<eos>")
    ours = kinds.ours(tmp_path)
    assert ours.within(100).vocab_size == ours.vocab_size > 100


def test_held_out_bytes_are_counted_with_bos_of_none(both):
    ours, _ = both
    assert np.all(ours.token_bytes[list(ours.lead_ids)] == 0)


@pytest.mark.parametrize("key", ["clean_up_tokenization_spaces", "split_special_tokens"])
@pytest.mark.parametrize("value", [True, False])
def test_a_word_piece_vocabulary_is_read_and_spelt_as_transformers_does(key, value, tmp_path):
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["[UNK]", "[SEP]", "the", "cat", "##s", ".", "!", "[", "]", "SE", "##P", "'", "s"]
    made = Tokenizer(models.WordPiece({word: id for id, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False)
    made.add_special_tokens(["[SEP]"])
    saved = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="[SEP]", unk_token="[UNK]")
    saved.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {key: value}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = kinds.ours(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the cats . the cat !", "the [SEP] cat", "the cat ' s"):
        ids = theirs(text)["input_ids"]
        assert ours.encode_prompt(text) == ours.encode_template(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    ours.save(tmp_path / "kept")
    cased = kinds.ours(tmp_path / "kept")
    assert cased.encode_prompt("a [SEP] .") == ours.encode_prompt("a [SEP] .")
    assert cased.decode([2, 3, 5]) == ours.decode([2, 3, 5])


def test_several_templates_by_name_without_a_default_are_named(tmp_path):
    kinds.save(tmp_path, eos_token="<eos>")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "rag", "template": "r"}, {"name": "tool_use", "template": "t"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = kinds.ours(tmp_path)
    with pytest.raises(UserError, match="no default.*rag.*tool_use"):
        ours.chat([{"role": "user", "content": "a"}])
    config["chat_template"].append({"name": "default", "template": "d{{ messages[0].content }}"})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert kinds.ours(tmp_path).chat([{"role": "user", "content": "a"}]) == "da"


def test_a_sentencepiece_model_alone_says_what_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(UserError, match="tokenizer.model, which sentencepiece reads; pip install sentencepiece"):
        kinds.ours(tmp_path)


def test_what_a_folder_lacks_is_one_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="cannot be loaded") as error:
        data.build_tokenizer(f"hf(path={str(tmp_path)!r})", "python_docs()")
    assert "\n" not in str(error.value)
