"""Folders of random text encoders of transformers, with every parameter jittered."""

import functools
import pathlib
import tempfile

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB, LENGTH = 96, 24
_CLIP = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
_CLIP |= {"num_attention_heads": 3, "max_position_embeddings": LENGTH, "projection_dim": 20}
_CLIP |= {"bos_token_id": None, "pad_token_id": None}
_T5 = {"vocab_size": VOCAB, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 3, "num_heads": 3}
_GELU = {"feed_forward_proj": "gated-gelu"}
# name -> (class, configuration class, values)
ENCODERS = {
    "clip-quick": ("CLIPTextModelWithProjection", "CLIPTextConfig", _CLIP | {"eos_token_id": 2}),
    "clip-erf": ("CLIPTextModelWithProjection", "CLIPTextConfig", _CLIP | {"eos_token_id": 95, "hidden_act": "gelu"}),
    "clip-plain": ("CLIPTextModel", "CLIPTextConfig", _CLIP | {"eos_token_id": 7, "layer_norm_eps": 1e-3}),
    "t5": ("T5EncoderModel", "T5Config", _T5 | _GELU | {"tie_word_embeddings": False}),
    "t5-erf": ("T5EncoderModel", "T5Config", _T5 | _GELU | {"dense_act_fn": "gelu"}),
    "t5-silu": (
        "T5EncoderModel",
        "T5Config",
        _T5 | {"feed_forward_proj": "gated-silu", "relative_attention_num_buckets": 8, "num_heads": 4}
        | {"relative_attention_max_distance": 12, "layer_norm_epsilon": 1e-3},
    ),
    "umt5": ("UMT5EncoderModel", "UMT5Config", _T5),
}  # fmt: skip


def build(name, seed=0, jitter=0.1, **changes):
    """A random encoder of transformers; norms, biases and tables too are random."""
    kind, config_kind, values = ENCODERS[name]
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(getattr(transformers, config_kind)(**values | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(jitter * torch.randn(parameter.shape))
    return model.eval()


@functools.cache
def reference(name):
    """The encoder of `saved`."""
    return build(name)


@functools.cache
def saved(name):
    """The folder that transformers saves the `reference` to. Tests do not change it."""
    folder = pathlib.Path(tempfile.mkdtemp())
    reference(name).save_pretrained(folder)
    return folder


def tokens(end_id, seed=0, length=LENGTH):
    """Two texts `[2, length]`: random ids, an end token, and the same id as padding; and which are no padding."""
    ids_BT = np.random.default_rng(seed).integers(8, VOCAB - 1, (2, length), np.int32)
    ends = np.array([[length - 1], [length // 2]])
    ids_BT = np.where(np.arange(length) < ends, ids_BT, end_id).astype(np.int32)
    return ids_BT, np.arange(length) <= ends
