"""Comparison of a text encoder's hidden vectors here and in transformers."""

import importlib.util
import typing

import flax.linen as nn
import jax
import numpy as np

from efficientllm import model
from efficientllm.convert.hf_config.text_encoders import PROJECTED
from efficientllm.convert.source import Source
from efficientllm.embeds.text_encoder import EncodedText
from efficientllm.errors import UserError
from efficientllm.runtime import optional_packages

LENGTH = 64
CLASSES = {"clip_text_model": "CLIPTextModel", "t5": "T5EncoderModel", "umt5": "UMT5EncoderModel"}


def compare_states(source: Source) -> dict[str, float]:
    """Compares float32 hidden vectors of two texts of random tokens, the second with padding that is not read.

    Returns `{"tokens", "max_difference", "max_state"}`, and of encoders with a vector of the text
    `"max_pooled_difference"`. Raises UserError without torch.
    """
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"check compares with transformers on torch: {optional_packages.remedy('peers')}")
    encoder = source.lm()
    params = source.load(nn.unbox(model.abstract_params(encoder)))
    length = min(LENGTH, model_length(encoder) or LENGTH)
    tokens_BT = np.random.default_rng(0).integers(0, encoder.vocab_size, (2, length), np.int32)
    real_BT = np.arange(length) < np.array([[length], [max(1, length // 2)]])
    if encoder.end_id is not None and encoder.end_id >= 0:
        tokens_BT[:, length // 2 :] = encoder.end_id
    actual = jax.jit(encoder.apply)({"params": params}, tokens_BT, real_BT)
    expected = encode_with(load_reference(source), tokens_BT, real_BT)
    differences = {
        "tokens": tokens_BT.size,
        "max_difference": float(np.abs(actual.states_BTD - expected.states_BTD).max()),
        "max_state": float(np.abs(expected.states_BTD).max()),
    }
    if actual.pooled_BD is not None:
        pooled_difference = float(np.abs(actual.pooled_BD - expected.pooled_BD).max())
        differences |= {"max_pooled_difference": pooled_difference}
        differences["max_difference"] = max(differences["max_difference"], pooled_difference)
    return differences


def model_length(encoder: typing.Any) -> int | None:
    """The most tokens of a text that an encoder reads; None is no limit."""
    from efficientllm.registry import build

    return build("position", encoder.position).max_positions


def load_reference(source: Source) -> typing.Any:
    """The model of transformers in float32, for evaluation."""
    import torch
    import transformers

    name = CLASSES[source.config["model_type"]]
    name = PROJECTED if source.config.get("architectures") == [PROJECTED] else name
    reference = getattr(transformers, name).from_pretrained(
        source.path, dtype=torch.float32, attn_implementation="eager", use_safetensors=True, trust_remote_code=False
    )
    return reference.eval()


def encode_with(reference: typing.Any, tokens_BT: np.ndarray, real_BT: np.ndarray | None = None) -> EncodedText:
    """The hidden vectors of a model of transformers, and the vectors of texts of one that has them."""
    import torch

    mask = None if real_BT is None else torch.tensor(real_BT).long()
    with torch.no_grad():
        outputs = reference(torch.tensor(tokens_BT).long(), attention_mask=mask)
    pooled = outputs.get("text_embeds", outputs.get("pooler_output"))
    return EncodedText(outputs.last_hidden_state.numpy(), None if pooled is None else pooled.numpy())
