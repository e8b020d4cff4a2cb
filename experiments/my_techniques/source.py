"""Data source and tokenizer: sections of Markdown files, and a token per character."""

import dataclasses
import hashlib

import numpy as np

from efficientllm.data import Source, cache, paths, streams
from efficientllm.registry import register


@register("data", "sections", example="sections(path='README.md')")
@dataclasses.dataclass(frozen=True)
class Sections(Source):
    """Documents are the texts between two headings."""

    path: str
    held_out: float = 0.1

    def documents(self):
        for path in paths.find_files(self.path, (".md",)):
            yield from filter(str.strip, streams.whole(path).split("\n## "))

    def key(self):  # optional: unchanged files are then not read again
        return f"{self} {cache.stat_key(paths.find_files(self.path, ('.md',)))}"


@register("tokenizer", "characters")
class Characters:
    """`fit` collects the characters of the training text."""

    def fit(self, corpus):
        return Alphabet(sorted(set().union(*corpus.texts("train"))))


class Alphabet:
    """A token per character, then one for unknown characters, then eos."""

    chat, lead_ids = None, ()

    def __init__(self, characters):
        self.characters = characters
        self.ids = {character: id for id, character in enumerate(characters)}
        self.unknown, self.eos_id, self.vocab_size = len(characters), len(characters) + 1, len(characters) + 2
        self.end_ids = (self.eos_id,)
        self.token_bytes = np.array([len(character.encode()) for character in characters] + [1, 0], np.int32)
        self.fingerprint = hashlib.sha256("".join(characters).encode()).hexdigest()

    def encode(self, text):
        return [self.ids.get(character, self.unknown) for character in text]

    encode_prompt = encode

    def encode_batch(self, texts):
        return [np.array(self.encode(text), np.uint32) for text in texts]

    def decode(self, ids):
        return "".join(self.characters[id] if id < self.unknown else "?" for id in ids if id != self.eos_id)

    def within(self, vocab_size):
        return self

    def text_of(self, id):
        return self.decode([id]) or "<eos>"
