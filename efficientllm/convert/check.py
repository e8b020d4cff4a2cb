"""Comparison of a checkpoint's outputs here and in transformers or diffusers."""

import importlib.util

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from efficientllm import model
from efficientllm.convert import check_denoiser, check_text_encoder, check_vision, reference_errors
from efficientllm.convert.source import Source
from efficientllm.errors import UserError
from efficientllm.ops.attention import Context
from efficientllm.runtime import optional_packages

TEXT = "The function returns a list of all the names in the module, sorted, or raises ValueError if there are none. "
TOLERANCE = 1e-3  # relative to the largest output: float32 rounding errors over dozens of layers


def compare_outputs(source: Source) -> tuple[dict[str, float], bool]:
    """Compares float32 outputs with the reference implementation: `(numbers by name, whether they are equal)`.

    Raises UserError without the packages that the reference needs.
    """
    reads = source.lm().reads
    if reads == "images":
        differences = check_denoiser.compare_predictions(source)
        return differences, differences["max_difference"] <= TOLERANCE * differences["max_prediction"]
    if reads == "prompts":
        differences = check_text_encoder.compare_states(source)
        return differences, differences["max_difference"] <= TOLERANCE * differences["max_state"]
    differences = check_vision.compare_logits(source) if reads == "text and images" else compare_logits(source)
    return differences, differences["max_logit_difference"] <= TOLERANCE * differences["max_logit"]


def compare_logits(source: Source, length: int = 64) -> dict[str, float]:
    """Compares float32 logits on `length` tokens.

    Returns `{"tokens", "max_logit_difference", "max_logit", "mean_kl", "same_first_choice"}`; the KL divergence is
    KL(transformers || ours) in nats a token. Raises UserError without torch.
    """
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"check compares with transformers on torch: {optional_packages.remedy('peers')}")
    ids = _ids(source, min(length, source.max_positions or length))
    expected, actual = _theirs(source, ids), _ours(source, ids)
    p, q = jax.nn.log_softmax(expected), jax.nn.log_softmax(actual)
    return {
        "tokens": ids.shape[1],
        "max_logit_difference": float(jnp.max(jnp.abs(expected - actual))),
        "max_logit": float(jnp.max(jnp.abs(expected))),
        "mean_kl": float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1))),
        "same_first_choice": float(jnp.mean(jnp.argmax(expected, -1) == jnp.argmax(actual, -1))),
    }


def _ids(source, length):
    """Tokens `[1, length]` of a text; random tokens if the source has no tokenizer."""
    from efficientllm.registry import build

    vocab_size = source.lm().vocab_size
    try:
        tokenizer = build("tokenizer", source.tokenizer()).fit(None)
    except UserError:
        return np.random.default_rng(0).integers(0, vocab_size, (1, length), np.int32)
    ids = tokenizer.encode(TEXT * length)[:length]
    return np.asarray([ids], np.int32)


def _ours(source, ids):
    lm = source.lm()
    params = source.load(nn.unbox(model.abstract_params(lm)))
    positions_BT = np.arange(ids.shape[1], dtype=np.int32)[None]
    return jax.jit(lm.apply)({"params": params}, ids, Context.packed(positions_BT))[0]


def _theirs(source, ids):
    import torch
    import transformers

    place = {"pretrained_model_name_or_path": source.path}
    if source.path.is_file():
        place = {"pretrained_model_name_or_path": source.path.parent, "gguf_file": source.path.name}
    with reference_errors.loading(source):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            **place,
            dtype=torch.float32,
            attn_implementation="eager",
            trust_remote_code=False,
            **({} if source.path.is_file() else {"use_safetensors": True}),  # never read a pickle beside them
        )
    with torch.no_grad():
        return jnp.asarray(loaded.eval()(torch.tensor(ids).long()).logits.numpy())
