"""Data pipeline: sources of documents, tokenizers, and packing into batches.

A data spec names where documents come from, a tokenizer spec how they become ids, and one iterator, whose state goes
into the checkpoint, yields rows packed from them.

A source of one's own is derived from `Source`, or of images from `ImageSource`, which say what they need. Images are
read by `data.images.ImageData`.
"""

from efficientllm.data.base import Example, ExampleSource, ImageSource, Picture, Source, modality
from efficientllm.data.pipeline import (
    build_tokenizer,
    calibration_rows,
    check_data,
    describe_data,
    eval_batches,
    train_iterator,
)

KINDS = {"data": "*", "tokenizer": "*"}

__all__ = [
    "Example",
    "ExampleSource",
    "ImageSource",
    "Picture",
    "Source",
    "build_tokenizer",
    "calibration_rows",
    "check_data",
    "describe_data",
    "eval_batches",
    "modality",
    "train_iterator",
]
