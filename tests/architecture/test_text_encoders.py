"""Published text encoders: parameters and FLOPs, exact by shapes alone."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from efficientllm import model
from efficientllm.architecture.text_encoders import PUBLISHED, build_published
from efficientllm.cost import formulas
from efficientllm.cost.jaxpr_flops import count_program_flops

transformers = pytest.importorskip("transformers")

_CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_BIGG = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
_T5 = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24}
_T5 |= {"feed_forward_proj": "gated-gelu"}
PROJECTED = "CLIPTextModelWithProjection"
# name: class, configuration, its values, tokens of a text, TFLOP of one (diffusers' pipelines)
THEIRS = {
    "clip_l": (PROJECTED, "CLIPTextConfig", _CLIP | {"projection_dim": 768}, 77, 0.0132),
    "clip_bigg": (PROJECTED, "CLIPTextConfig", _BIGG | {"projection_dim": 1280, "hidden_act": "gelu"}, 77, 0.0974),
    "t5_xxl": ("T5EncoderModel", "T5Config", _T5 | {"vocab_size": 32128}, 256, 2.397),
    "umt5_xxl": ("UMT5EncoderModel", "UMT5Config", _T5 | {"vocab_size": 256384}, 512, 4.845),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_transformers(name):
    torch = pytest.importorskip("torch")
    kind, config_kind, values, _, _ = THEIRS[name]
    with torch.device("meta"):
        reference = getattr(transformers, kind)(getattr(transformers, config_kind)(**values))
    abstract = nn.unbox(model.abstract_params(build_published(name)))
    expected = sum(parameter.numel() for parameter in reference.parameters())
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract)) == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_flops_are_those_of_the_program(name):
    """The scores and values of a causal text count half; the kernel computes all pairs."""
    length, tflop = THEIRS[name][-2:]
    encoder = build_published(name, attention_kernel="xla")
    boxed = model.abstract_params(encoder)
    assert formulas.forward_flops(encoder, boxed, length) == pytest.approx(1e12 * tflop, rel=2e-3)

    def encode(params):
        return encoder.apply({"params": params}, jnp.zeros((1, length), jnp.int32))

    counted = count_program_flops(jax.jit(encode).trace(nn.unbox(boxed)).jaxpr)
    assert counted == formulas.forward_flops(encoder, boxed, length, executed=True)
