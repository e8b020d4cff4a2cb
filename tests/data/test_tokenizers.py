"""Round trips on odd Unicode, exact byte counts, and an eos that no text can spell."""

import numpy as np
import pytest

from efficientllm import data
from efficientllm.data.tokenizers import FastTokenizer
from efficientllm.errors import UserError
from efficientllm.registry import build

pytestmark = pytest.mark.quick

ODD = [
    "",
    " ",
    "\n\n\t x  y\r\n",
    "na\u00efve cafe\u0301 \u00e9",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1ee",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u4f60\u597d\u4e16\u754c \ud55c\uad6d\uc5b4",
    "\x00\x01\x7f\ufeff\u2028\u2029\ufffd",
    "<|endoftext|> <eos> </s> <pad>",
    "\U0010ffff\u0378 \u00bd \u2167 \u0661",
    "x" * 5000,
]


def test_an_unknown_token_that_is_none_is_one_line(tmp_path):
    """The backend finds out with the first text that needs it."""
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "<eos>": 1}, unk_token="")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}'
    )
    tokenizer = build("tokenizer", f"hf(path={str(tmp_path)!r})").fit(None)
    for encode in (tokenizer.encode, tokenizer.encode_prompt, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(UserError, match="cannot encode this text"):
            encode("b")


@pytest.fixture
def folder(tmp_path):
    """A byte-level tokenizer with special tokens, as transformers saves one."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    backend.train_from_iterator(["the cat sat on the mat"] * 3, trainer)
    saved = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    saved.add_tokens(["<th\u00efnk>"])
    saved.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture(params=["bytes", "bpe(vocab_size=300)", "hf"])
def tokenizer(request, spec):
    tokenizer_spec = request.param
    if tokenizer_spec == "hf":
        tokenizer_spec = f"hf(path={str(request.getfixturevalue('folder'))!r})"
    return data.build_tokenizer(tokenizer_spec, spec)


@pytest.mark.parametrize("text", ODD)
def test_text_survives_and_its_bytes_are_counted(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert all(0 <= id < tokenizer.vocab_size and id != tokenizer.eos_id for id in ids)


def test_batches_encode_as_single_texts_do(tokenizer):
    for text, ids in zip(ODD, tokenizer.encode_batch(ODD), strict=True):
        assert list(ids) == tokenizer.encode(text)


def test_eos_is_an_id_of_no_bytes_and_decodes_to_nothing(tokenizer):
    assert 0 <= tokenizer.eos_id < tokenizer.vocab_size == len(tokenizer.token_bytes)
    assert tokenizer.token_bytes.dtype == np.int32
    assert tokenizer.token_bytes[tokenizer.eos_id] == 0
    assert tokenizer.decode([*tokenizer.encode("end"), tokenizer.eos_id]) == "end"


def test_added_words_count_their_bytes(folder, spec):
    tokenizer = data.build_tokenizer(f"hf(path={str(folder)!r})", spec)
    ids = tokenizer.encode("<th\u00efnk>")
    assert len(ids) == 1
    assert tokenizer.token_bytes[ids].sum() == len("<th\u00efnk>".encode())


def test_bpe_learns_the_corpus(spec, texts):
    tokenizer = data.build_tokenizer("bpe(vocab_size=300)", spec)
    assert 257 < tokenizer.vocab_size <= 300
    assert len(tokenizer.encode(texts[0])) < len(texts[0].encode())


def test_bpe_is_trained_once_and_on_train_documents_only(spec, cache_dir, monkeypatch):
    from efficientllm.data.corpus import Corpus

    read = []
    monkeypatch.setattr(Corpus, "texts", lambda self, side, real=Corpus.texts: read.append(side) or real(self, side))
    first = data.build_tokenizer("bpe(vocab_size=300)", spec)
    again = data.build_tokenizer("bpe(vocab_size=300)", spec)
    assert read == ["train"]
    assert first.fingerprint == again.fingerprint != data.build_tokenizer("bpe(vocab_size=280)", spec).fingerprint


def test_sentencepiece_spelling_is_counted_as_text():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {"\u2581a": 0, "\u00e9": 1, "<0x0A>": 2, "<unk>": 3}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    assert FastTokenizer(backend, 3, 4).token_bytes[:3].tolist() == [2, 2, 1]


def test_what_cannot_be_a_tokenizer_is_refused(tmp_path, spec, folder):
    with pytest.raises(UserError, match="vocab_size = 256: must be at least 257"):
        data.build_tokenizer("bpe(vocab_size=256)", spec)
    with pytest.raises(UserError, match=r"^tokenizer: hf\(path='.*nowhere'\): cannot be loaded"):
        data.build_tokenizer(f"hf(path={str(tmp_path / 'nowhere')!r})", spec)
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"eos_token": "<eos>"', '"eos_token": null'))
    with pytest.raises(UserError, match="has no eos token"):
        data.build_tokenizer(f"hf(path={str(folder)!r})", spec)


def test_an_id_without_bound_makes_no_array_of_its_size():
    from tokenizers import Tokenizer, models

    with pytest.raises(UserError, match="a token of the id 4000000000; ids below 33554432"):
        FastTokenizer(Tokenizer(models.WordLevel({"a": 4_000_000_000, "b": 0}, unk_token="b")), 0)
