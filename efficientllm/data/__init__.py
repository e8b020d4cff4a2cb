"""Text to batches: sources, tokenizers, packing.

A data spec names where documents come from, a tokenizer spec how they become ids, and one iterator, whose state goes
into the checkpoint, yields rows packed from them. Letters in names: B sequences per step, T row length, V vocabulary.
"""

from efficientllm.data.pipeline import build_tokenizer, describe, eval_batches, train_iterator

__all__ = ["build_tokenizer", "describe", "eval_batches", "train_iterator"]
