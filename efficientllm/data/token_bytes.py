"""UTF-8 bytes of each token of a vocabulary, by which losses of different tokenizers are compared."""

import typing

import numpy as np

_WORDPIECE, _SENTENCEPIECE = "##", "\u2581"


def count_token_bytes(backend: typing.Any, vocab_size: int) -> np.ndarray:
    """Counts the UTF-8 bytes of each token, int32 `[vocab_size]`.

    The counts are exact for byte-level vocabularies, whose tokens spell each byte as one character. A token of
    SentencePiece or WordPiece counts as its text within a sentence.
    """
    byte_level = "ByteLevel" in str(backend.decoder)
    added = backend.get_added_tokens_decoder()
    counts: np.ndarray = np.zeros(vocab_size, np.int32)
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
