"""An open checkpoint of a text encoder: a folder of transformers, such as `text_encoder_3` of a pipeline's."""

import dataclasses
import pathlib
import typing

import numpy as np

from efficientllm.convert.hf_config import families
from efficientllm.convert.source import Source
from efficientllm.convert.tensors import headless_names, parameter_map
from efficientllm.convert.tensors.tensor_reader import TensorReader
from efficientllm.errors import UserError
from efficientllm.model import Backbone

_HEADS = ("text_projection.weight",)
_TWIN = "encoder.embed_tokens.weight"  # of the embedding, in some files of T5


@dataclasses.dataclass(frozen=True)
class TextEncoderSource(Source):
    """Source of a text encoder. Its tokenizer lies in another folder of the pipeline."""

    def bind(self, lm: Backbone) -> dict[str, typing.Any]:
        """`{our path: parameter_map.Leaf}`, checked against the files, as a second copy of the embedding is."""
        if self.tensors.has_own_paths:
            return self.tensors.bind(lm)
        leaves = parameter_map.bind_parameters(lm, self.table)
        ignored = families.ignored_patterns(self.config)
        embedding = leaves["embedding"].template
        if {_TWIN, embedding} <= self.tensors.shapes.keys():
            if not np.array_equal(self.tensors.read(_TWIN), self.tensors.read(embedding)):
                raise UserError(f"{self.path}: tensor {_TWIN!r} is not {embedding!r}: the model has one embedding")
            ignored = (*ignored, rf"^{_TWIN}$")
        parameter_map.check_tensors(leaves, self.tensors.shapes, ignored, self.path)
        return leaves


def open_encoder(
    path: pathlib.Path,
    config: dict[str, typing.Any],
    model: dict[str, typing.Any],
    tensors: TensorReader | None,
    name: str,
) -> TextEncoderSource:
    """The source of a text encoder with the overrides `model` of `config.model`; `tensors` are None without weights."""
    table = families.find_family(config).table
    if tensors is not None and not tensors.has_own_paths:
        tensors = headless_names.add_prefix(tensors, table, _HEADS)
    return TextEncoderSource(path, config, model, None, tensors, table, name)
