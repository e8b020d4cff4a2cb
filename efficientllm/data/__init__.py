"""Text to batches: sources, tokenizers, packing.

A data spec names where documents come from, a tokenizer spec how they become ids, and one iterator, whose state goes
into the checkpoint, yields rows packed from them.

A source of one's own is a class registered as ("data", name) with: `held_out`, the share of documents kept for
evaluation; `documents()`, which yields (text, text whose hash decides the side) in a fixed order; `key()`, a string
that changes with the content and is cheap to make; and `streaming = False`.
"""

from efficientllm.data.pipeline import build_tokenizer, describe, eval_batches, train_iterator

__all__ = ["build_tokenizer", "describe", "eval_batches", "train_iterator"]
