"""One text encoder of a pipeline with its tokenizer; its parameters are in memory only while it encodes."""

import dataclasses
import functools
import logging
import pathlib
import typing
from collections.abc import Sequence

import flax.linen as nn
import jax
import numpy as np

from efficientllm import model, sharding
from efficientllm.convert import open_source
from efficientllm.convert.source import Source
from efficientllm.embeds.text_encoder import EncodedText, TextEncoder
from efficientllm.errors import UserError
from efficientllm.quant import apply
from efficientllm.registry import build
from efficientllm.text_states.tokenize_prompts import PromptTokenizer
from efficientllm.typing import Params
from efficientllm.weights import resident_bytes

ROWS = 8  # prompts encoded at a time
log = logging.getLogger("efficientllm")


@dataclasses.dataclass(frozen=True)
class PipelineEncoder:
    """A text encoder of a pipeline.

    Args:
      part: its folder.
      tokenizer: its tokenizer, which says how many tokens it reads.
      source: its open checkpoint.
      precision: the dtype of its activations and products (`config.model.precision`).
      quant: the form of its weights; `float32` leaves them as they are, `stored` as the files have them.
      skip: see `TextEncoder`.
      masked: whether padding is not read.
    """

    part: pathlib.Path
    tokenizer: PromptTokenizer
    source: Source
    precision: str
    quant: str
    skip: int = 0
    masked: bool = False

    @functools.cached_property
    def module(self) -> TextEncoder:
        """The model, without parameters."""
        return self.source.lm(precision=self.precision, scan=self.quant != "stored").clone(skip=self.skip)

    def check(self) -> None:
        """Raises UserError naming a tensor of the files that is missing, extra or of another shape."""
        self.source.bind(self.module)

    @property
    def weights_bytes(self) -> int | None:
        """Bytes of the parameters in their form, by their shapes; None for `stored`, which the files alone know."""
        if self.quant == "stored":
            return None
        return resident_bytes(apply.abstract(nn.unbox(model.abstract_params(self.module)), self.quant))

    def load_params(self) -> Params:
        """Reads the parameters, each rounded to its form before the next is read; sharded over a mesh in scope."""
        module, mesh = self.module, jax.sharding.get_mesh()
        boxed = model.abstract_params(module)
        abstract = nn.unbox(boxed) if mesh.empty else sharding.abstract_shards(boxed, mesh)
        if self.quant == "stored":
            return self.source.load_stored(abstract, module)
        return self.source.load(abstract, lm=module, transform=apply.rounder(self.quant))

    def encode(self, prompts: Sequence[str]) -> tuple[EncodedText, np.ndarray]:
        """Encodes prompts; returns arrays on the host, and which tokens `[B, T]` are no padding."""
        if not prompts:
            raise UserError("no prompt: give one at least")
        tokens_BT, real_BT = self.tokenizer.encode(prompts)
        log.info(f"{self.part.name}: encoding {len(prompts):,} prompts")
        module, params, chunks = self.module, self.load_params(), []
        encode = jax.jit(module.apply)
        for start in range(0, len(prompts), ROWS):
            rows = slice(start, start + ROWS)
            encoded = encode({"params": params}, tokens_BT[rows], real_BT[rows] if self.masked else None)
            chunks.append(jax.tree.map(np.asarray, encoded))
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *chunks), real_BT


def open_encoder(
    part: pathlib.Path,
    tokenizer: pathlib.Path,
    length: int | None = None,
    truncate: bool = False,
    **fields: typing.Any,
) -> PipelineEncoder:
    """Opens the encoder of the folder `part`; no tensor is read.

    `length` is the tokens of a prompt; None is as many as the encoder has positions. `fields` are those of
    `PipelineEncoder`. Raises UserError for a folder that is missing or holds another model.
    """
    for folder in (part, tokenizer):
        if not folder.is_dir():
            raise UserError(f"{folder}: is missing; name the folder of a whole pipeline, or leave its encoder out")
    source = open_source(part)
    module = source.lm()
    if module.reads != TextEncoder.reads:
        raise UserError(f"{part}: holds a model of {module.reads}, not a text encoder: a part of another pipeline")
    length = length or build("position", module.position).max_positions
    if length is None:
        raise UserError(f"{part}: reads texts of any length; say how many tokens a prompt has")
    prompts = PromptTokenizer(tokenizer, length, module.vocab_size, truncate)
    return PipelineEncoder(part, prompts, source, **fields)
