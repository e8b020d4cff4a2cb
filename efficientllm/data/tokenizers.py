"""Tokenizers: bytes, a byte-level BPE trained on the corpus, and those of the Hugging Face hub.

What `tokenizer` names in the registry is a recipe; `recipe.fit(corpus)` gives the tokenizer:
`vocab_size` (every id is below it), `eos_id`, `encode(text)`, `encode_batch(texts)`, `decode(ids)`, `fingerprint`, and
`token_bytes`, int32 [V]: the UTF-8 bytes of text that each id stands for, 0 for special ones, which turns a loss per
token into bits per byte.
"""

import dataclasses
import functools
import hashlib
import os
import warnings

import numpy as np

from efficientllm.data import cache
from efficientllm.errors import UserError
from efficientllm.registry import register

_WORDPIECE, _SENTENCEPIECE = "##", "\u2581"


@register("tokenizer", "bytes")
class Bytes:
    """The 256 bytes of UTF-8, and eos."""

    vocab_size, eos_id, fingerprint, chat = 257, 256, "bytes", None

    def __init__(self):
        self.token_bytes = np.array([1] * 256 + [0], np.int32)

    def fit(self, corpus):
        """Itself: there is nothing to learn."""
        return self

    def encode(self, text):
        return list(text.encode())

    def encode_context(self, text, special=True):
        return self.encode(text)

    def encode_batch(self, texts):
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids):
        return bytes(id for id in ids if id < 256).decode(errors="replace")


@register("tokenizer", "bpe")
@dataclasses.dataclass(frozen=True)
class BPE:
    """Byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909; over bytes as in GPT-2), so that any text
    has tokens. Trained on `sample_bytes` of the train documents: the same share of each, from its start. The last id
    is eos, which no text can spell."""

    vocab_size: int = 4096
    sample_bytes: int = 2_000_000

    def fit(self, corpus):
        """The tokenizer trained on `corpus`, or its cached copy. Raises UserError below 257 ids: the bytes and eos."""
        import tokenizers

        if self.vocab_size < 257:
            raise UserError(
                f"config.tokenizer: bpe(vocab_size={self.vocab_size}) must be at least 257: the bytes and eos"
            )
        parts = (corpus.summary["fingerprint"], self.vocab_size, self.sample_bytes, tokenizers.__version__)
        folder = cache.entry(corpus.cache, f"bpe-{cache.digest(*parts)}", lambda new: self._train(corpus, new))
        trained = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        return Backed(trained, trained.get_vocab_size(), trained.get_vocab_size() + 1)

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


@register("tokenizer", "hf")
@dataclasses.dataclass(frozen=True)
class HuggingFace:
    """The tokenizer that `transformers` loads from `path`: a folder, the name of a repository on the hub, or a GGUF
    file."""

    path: str

    def fit(self, corpus):
        """Raises UserError if there is no such tokenizer, or if it lacks eos or a fast implementation."""
        import transformers

        try:
            with warnings.catch_warnings():  # torch, where it is installed, imports pynvml by its package's old name
                warnings.filterwarnings("ignore", "The pynvml package is deprecated", FutureWarning)
                loaded = transformers.AutoTokenizer.from_pretrained(self._folder())
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"config.tokenizer: hf(path={self.path!r}) cannot be loaded ({reason}); name a folder or a repository"
            ) from error
        if not loaded.is_fast or loaded.eos_token_id is None:
            missing = "eos token" if loaded.is_fast else "fast implementation"
            raise UserError(f"config.tokenizer: hf(path={self.path!r}) has no {missing}")
        return from_transformers(loaded)

    def _folder(self):
        """What `from_pretrained` takes. A GGUF file's vocabulary is converted once: it takes seconds."""
        if not self.path.endswith(".gguf"):
            return self.path
        import transformers

        key = cache.digest(cache.stat_key([os.path.realpath(self.path)]), transformers.__version__)
        return cache.entry(cache.root(), f"gguf-tokenizer-{key}", self._convert)

    def _convert(self, folder):
        import transformers

        where, name = os.path.split(self.path)
        transformers.AutoTokenizer.from_pretrained(where or ".", gguf_file=name).save_pretrained(folder)


def from_transformers(loaded):
    """The tokenizer that `transformers` has loaded, with its chat template if it has one."""
    chat = functools.partial(_chat, loaded) if loaded.chat_template else None
    template = loaded.chat_template or ""
    return Backed(
        loaded.backend_tokenizer, loaded.eos_token_id, len(loaded), chat, template, bos_id=loaded.bos_token_id
    )


def _chat(loaded, messages, **how):
    """The text of a conversation. Raises UserError where the template takes no such one: it may refuse roles."""
    import jinja2

    try:
        return loaded.apply_chat_template(messages, tokenize=False, **how)
    except jinja2.TemplateError as error:
        roles, said = ", ".join(message["role"] for message in messages), " ".join(str(error).split())
        begin = messages[0]["content"] if messages else ""
        raise UserError(
            f"the tokenizer's chat template refuses a conversation of {roles} that begins {begin!r:.60} ({said})"
        ) from None


class Backed:
    """A tokenizer of the `tokenizers` library with an eos of its own or of ours.

    Special tokens that a text spells out are read as text: a document cannot end itself. Only `encode_template` reads
    them as what they are. `chat(messages, add_generation_prompt=False)` is the text of a conversation, or None.
    """

    def __init__(self, backend, eos_id, vocab_size, chat=None, template="", bos_id=None):
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self.backend, self.eos_id, self.vocab_size = backend, eos_id, vocab_size
        self.chat, self.template, self.bos_id = chat, template, bos_id
        self.fingerprint = hashlib.sha256(f"{eos_id} {template} {backend.to_str()}".encode()).hexdigest()
        self.token_bytes = _token_bytes(backend, vocab_size)

    def encode(self, text):
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_template(self, text):
        """Ids of a text that a chat template made: special tokens are special."""
        self.backend.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self.backend.encode_special_tokens = True

    def encode_context(self, text, special=True):
        """Ids as transformers gives them: what the text spells out is special, and with `special` the tokens that the
        tokenizer puts around a text are there, unless it begins with them."""
        plain = self.encode_template(text)
        if not special:
            return plain
        self.backend.encode_special_tokens = False
        try:
            whole = self.backend.encode(text, add_special_tokens=True).ids
        finally:
            self.backend.encode_special_tokens = True
        return plain if plain[:1] == whole[:1] == [self.bos_id] else whole

    def encode_batch(self, texts):
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids):
        known = [int(id) for id in ids if id != self.eos_id]
        return self.backend.decode(known, skip_special_tokens=True)


def _token_bytes(backend, vocab_size):
    """Exact for byte-level vocabularies, whose tokens spell each byte as one character; for SentencePiece and WordPiece
    a token counts as the text it stands for within a sentence."""
    byte_level = "ByteLevel" in str(backend.decoder)
    added = backend.get_added_tokens_decoder()
    counts = np.zeros(vocab_size, np.int32)
    for token, id in backend.get_vocab(with_added_tokens=True).items():
        if id in added:
            counts[id] = 0 if added[id].special else len(token.encode())
        else:
            counts[id] = len(token) if byte_level else len(_surface(token))
    return counts


def _surface(token):
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):  # SentencePiece's spelling of a byte
        return bytes.fromhex(token[3:5])
    return token.removeprefix(_WORDPIECE).replace(_SENTENCEPIECE, " ").encode()
