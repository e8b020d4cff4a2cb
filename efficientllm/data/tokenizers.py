"""Tokenizers: bytes, a byte-level BPE trained on the corpus, and FastTokenizer, which wraps the `tokenizers` library.

The registry's kind `tokenizer` holds recipes; `recipe.fit(corpus)` returns a tokenizer with

`vocab_size` (every id is below it), `eos_id`, which closes a document, `end_ids`, at any of which generation stops,
`lead_ids`, which open a document (BOS, where the tokenizer adds it), `encode(text)`, `encode_prompt(text)`,
`encode_batch(texts)`, `decode(ids)`, `fingerprint`, and `token_bytes`, int32 [V]: the UTF-8 bytes of text that each id
stands for, 0 for special ones, which turns a loss per token into bits per byte.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import typing

import numpy as np

from efficientllm.data import cache
from efficientllm.data.token_bytes import count_token_bytes
from efficientllm.errors import FieldError
from efficientllm.registry import register

_EOS = ("<|endoftext|>", "<|eos|>", "<|end|>")  # names of an eos of ours, of which a text has hardly spelt all
MOST_IDS = 1 << 25  # arrays of as many numbers are made


@register("tokenizer", "bytes")
class Bytes:
    """The 256 bytes of UTF-8, and eos."""

    vocab_size, eos_id, fingerprint, chat = 257, 256, "bytes", None
    end_ids, lead_ids = (256,), ()

    def __init__(self):
        self.token_bytes = np.array([1] * 256 + [0], np.int32)

    def fit(self, corpus: typing.Any) -> "Bytes":
        """Returns itself: there is nothing to train."""
        return self

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_prompt(self, text: str) -> list[int]:
        return self.encode(text)

    def encode_context(self, text: str, special: bool = True) -> list[int]:
        return self.encode(text)

    def within(self, vocab_size: int) -> "Bytes":
        """Returns itself: any model's vocabulary holds its ids."""
        return self

    def save(self, folder: pathlib.Path) -> None:
        """Writes nothing: bytes need no file."""

    def text_of(self, id: int) -> str:
        """What the token `id` is called."""
        return "<eos>" if id == self.eos_id else repr(bytes([id]))

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids: typing.Iterable[int]) -> str:
        return bytes(id for id in ids if id < 256).decode(errors="replace")


@register("tokenizer", "bpe")
@dataclasses.dataclass(frozen=True)
class BPE:
    """Byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909; over bytes as in GPT-2), so that any text
    has tokens. Trained on `sample_bytes` of the train documents: the same share of each, from its start. The last id
    is eos, which no text can spell."""

    vocab_size: int = 4096
    sample_bytes: int = 2_000_000

    def fit(self, corpus: typing.Any) -> "FastTokenizer":
        """Trains the tokenizer on `corpus`, or loads its cached copy. Raises UserError below 257 ids (bytes, eos)."""
        import tokenizers

        if self.vocab_size < 257:
            raise FieldError("tokenizer", f"vocab_size = {self.vocab_size}: must be at least 257: the bytes and eos")
        inputs = (corpus.summary["fingerprint"], self.vocab_size, self.sample_bytes, tokenizers.__version__)
        folder = cache.entry(corpus.cache, f"bpe-{cache.digest(*inputs)}", lambda new: self._train(corpus, new))
        trained = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        return FastTokenizer(trained, trained.get_vocab_size(), trained.get_vocab_size() + 1)

    def _train(self, corpus, folder):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size - 1,
            min_frequency=2,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=[],
            show_progress=False,
        )
        share = self.sample_bytes / max(corpus.summary["train_bytes"], 1)
        sample = (text[: 1 + int(len(text) * share)] for text in corpus.texts("train"))
        tokenizer.train_from_iterator(sample, trainer)
        tokenizer.save(str(folder / "tokenizer.json"))


class FastTokenizer:
    """A tokenizer of the `tokenizers` library with an eos of its own or of ours.

    Special tokens that a text spells out are read as text: a document cannot end itself. `encode_template`,
    `encode_prompt` and `encode_context` read them as what they are, as transformers does, unless `splits`.
    `chat(messages, add_generation_prompt=False)` is the text of a conversation, or None;
    `marked(messages)` is that text and the characters that its template marks as the assistant's, or None.

    Args:
      backend: the `tokenizers.Tokenizer`.
      eos_id: what closes a document.
      vocab_size: every id is below it; more than the tokenizer's where eos is ours.
      chat: as above.
      template: the text of the chat template, for the fingerprint.
      bos_id: the id of BOS, whether or not the tokenizer adds it.
      end_ids: at which generation stops; eos alone by default.
      marked: as above.
      save: what writes it to a folder as transformers does; None for one of ours.
      splits: special tokens are text everywhere (`split_special_tokens` of tokenizer_config.json).
      clean: what a decoded text goes through; nothing by default.
    """

    def __init__(
        self,
        backend: typing.Any,
        eos_id: int,
        vocab_size: int = 0,
        chat: typing.Callable | None = None,
        template: str = "",
        bos_id: int | None = None,
        end_ids: typing.Iterable[int] = (),
        marked: typing.Callable | None = None,
        save: typing.Callable | None = None,
        splits: bool = False,
        clean: typing.Callable[[str], str] = str,
    ):
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        # Ids may have holes: the number of tokens is no bound of them.
        largest = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest >= MOST_IDS:
            raise FieldError("tokenizer", f"has a token of the id {largest}; ids below {MOST_IDS} are read")
        self.backend, self.eos_id, self.vocab_size = backend, eos_id, max(vocab_size, largest + 1, eos_id + 1)
        self.chat, self.template, self.bos_id = chat, template, bos_id
        self.end_ids, self.lead_ids = tuple(end_ids) or (eos_id,), _lead(backend)
        identity = f"{eos_id} {self.end_ids} {template} {backend.to_str()}{' splits' if splits else ''}"
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        self.token_bytes = count_token_bytes(backend, self.vocab_size)
        self.marked = marked or (lambda messages, **how: None)
        self._limit: int | None = None
        self._save = save or self._save_own
        self._splits, self._clean = splits, clean

    def within(self, vocab_size: int) -> "FastTokenizer":
        """Limits the tokenizer to the `vocab_size` ids of a model's embedding, and returns it.

        Only added tokens may have ids beyond; a text that contains one then raises UserError. Where other tokens are
        beyond too, the tokenizer is returned unchanged.
        """
        added = self.backend.get_added_tokens_decoder()
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        needed = [self.eos_id, *self.lead_ids, *(id for id in vocabulary.values() if id not in added)]
        if self.vocab_size <= vocab_size or max(needed) >= vocab_size:
            return self
        self.vocab_size = self._limit = vocab_size
        self.token_bytes = self.token_bytes[:vocab_size]
        self.end_ids = tuple(id for id in self.end_ids if id < vocab_size) or (self.eos_id,)
        return self

    def save(self, folder: pathlib.Path) -> None:
        """Writes a new folder that `hf(path=...)` and transformers load, with eos among the end tokens."""
        folder.mkdir(parents=True)
        self._save(folder)
        ends = list(dict.fromkeys([self.eos_id, *self.end_ids]))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))

    def _save_own(self, folder):
        """As transformers would; an eos that is no token here becomes one there."""
        copy, eos = type(self.backend).from_str(self.backend.to_str()), self.backend.id_to_token(self.eos_id)
        if eos is None:
            eos = next(name for name in _EOS if self.backend.token_to_id(name) is None)
            copy.add_special_tokens([eos])
        copy.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))

    def text_of(self, id: int) -> str:
        """What the token `id` is called."""
        return self.backend.id_to_token(int(id)) or ("<eos>" if id == self.eos_id else f"<id {id}>")

    def encode(self, text: str) -> list[int]:
        return self._inside(self._encoded(self.backend.encode, text, False).ids)

    def _encoded(self, encode, text, add):
        """`encode` of the backend. Raises UserError for a tokenizer that cannot, such as one whose unknown token is no
        token of it: the backend finds out with the first text that needs it."""
        try:
            return encode(text, add_special_tokens=add)
        except Exception as error:  # the only class that it raises
            raise FieldError("tokenizer", f"cannot encode this text: {error}") from None

    def encode_template(self, text: str) -> list[int]:
        """Tokenizes a text that a chat template rendered; special tokens are recognized."""
        return self._inside(self._special(text, False).ids)

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokenizes as `encode_template` and returns for each id also its `(start, end)` in characters."""
        encoding = self._special(text, False)
        return self._inside(encoding.ids), encoding.offsets

    def encode_prompt(self, text: str) -> list[int]:
        """Tokenizes as transformers does: special tokens are recognized, and BOS and the like are added."""
        return self._inside(self._special(text, True).ids)

    def encode_context(self, text: str, special: bool = True) -> list[int]:
        """Tokenizes as lm-evaluation-harness does: BOS is added if `special`, unless the text begins with it."""
        plain = self.encode_template(text)
        if not special:
            return plain
        whole = self.encode_prompt(text)
        return plain if plain[:1] == whole[:1] == [self.bos_id] else whole

    def _special(self, text, add):
        self.backend.encode_special_tokens = self._splits
        try:
            return self._encoded(self.backend.encode, text, add)
        finally:
            self.backend.encode_special_tokens = True

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._encoded(self.backend.encode_batch_fast, texts, False)
        return [np.array(self._inside(encoding.ids), np.uint32) for encoding in encodings]

    def _inside(self, ids):
        """Returns the ids. Raises UserError for one that the model has no embedding of."""
        if self._limit is not None and ids and max(ids) >= self._limit:
            raise FieldError(
                "tokenizer",
                f"a text spells the token {self.text_of(max(ids))!r}, whose id {max(ids)} lies beyond the model's "
                f"embedding of {self._limit} tokens; leave it out",
            )
        return ids

    def decode(self, ids: typing.Iterable[int]) -> str:
        text_ids = [int(id) for id in ids if id != self.eos_id]
        return self._clean(self.backend.decode(text_ids, skip_special_tokens=True))


def keep(tokenizer: typing.Any, folder: pathlib.Path) -> None:
    """Writes a run's tokenizer to `folder` atomically, for use of the run as a checkpoint.

    An existing folder is left as it is. A tokenizer without `save` is not written: the run's config names it.
    """
    if folder.exists() or not hasattr(tokenizer, "save"):
        return
    for left in folder.parent.glob(f".{folder.name}-*"):  # of a run that was killed just then
        shutil.rmtree(left)
    draft = folder.with_name(f".{folder.name}-{os.getpid()}")
    tokenizer.save(draft)
    if draft.exists():
        draft.rename(folder)


def _lead(backend):
    """Returns the ids that the tokenizer puts before a text."""
    encoding = backend.encode("a", add_special_tokens=True)
    marks = encoding.special_tokens_mask
    return tuple(encoding.ids[: marks.index(0) if 0 in marks else 0])
