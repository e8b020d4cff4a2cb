"""Pythia (Biderman et al. 2023, arXiv:2304.01373), which is GPT-NeoX, against transformers'."""

import flax.linen as nn
import jax
import numpy as np
import pytest

import peer
from configs import base
from efficientllm import model
from efficientllm.architecture import from_config
from tiers import slow_case

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LAYERS = 2
BLOCK = {
    "mixer": "mha(qkv_bias=True, o_bias=True)",
    "ffn": "gelu",
    "norm": "layernorm(eps=1e-5)",
    "tied": False,
}
LAYER = peer.named(
    {
        "mixer_norm": "input_layernorm",
        "mixer/q": "attention.query",
        "mixer/k": "attention.key",
        "mixer/v": "attention.value",
        "mixer/o": "attention.dense",
        "ffn_norm": "post_attention_layernorm",
        "ffn/up": "mlp.dense_h_to_4h",
        "ffn/down": "mlp.dense_4h_to_h",
    },
    prefix="gpt_neox.layers.{}.",
)
TOP = peer.named({"norm": "gpt_neox.final_layer_norm"})
TOP |= {"embedding": "gpt_neox.embed_in.weight", "head/kernel": "lm_head.weight"}


def pair(seed, parallel, fraction, scaled):
    """A random reference, ours of its shape, and the function from its tensors to ours."""
    rng = np.random.default_rng(seed)
    H, K, hidden, rope_base = (rng.choice(sizes).item() for sizes in ((2, 3, 5), (8, 16), (40, 72), (1e4, 500.0)))
    rope = {"rope_type": "default", "rope_theta": rope_base, "partial_rotary_factor": fraction}
    config = transformers.GPTNeoXConfig(
        vocab_size=peer.VOCAB,
        hidden_size=H * K,
        intermediate_size=hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=H,
        rope_parameters=rope | ({"rope_type": "linear", "factor": 3.0} if scaled else {}),
        use_parallel_residual=parallel,
        attn_implementation="eager",
    )
    reference = peer.randomise(transformers.GPTNeoXForCausalLM(config), seed)
    scaling = "linear(factor=3.0)" if scaled else "none"
    ours = peer.lm(
        {"num_layers": LAYERS, "dim": H * K, "num_heads": H, "head_dim": K, "hidden": hidden, "rope_base": rope_base},
        position=f"rope(fraction={fraction}, scaling={scaling!r})",
        residual="parallel" if parallel else "sequential",
        **BLOCK,
    )
    return reference, ours, lambda tensors: peer.tree(peer.unfuse(tensors, H), LAYERS, LAYER, TOP)


@pytest.mark.parametrize(
    "seed, parallel, fraction, scaled",
    [slow_case(0, True, 0.25, False), slow_case(2, False, 0.25, False), (3, True, 0.5, True)],
)
def test_logits_loss_and_gradients(seed, parallel, fraction, scaled):
    peer.check(*pair(seed, parallel, fraction, scaled), peer.tokens(seed, 41), 1e-5)


@pytest.mark.parametrize(
    "num_layers, dim, num_heads, published",
    [
        pytest.param(24, 1024, 16, 405_334_016, id="410m"),
        pytest.param(16, 2048, 8, 1_011_781_632, id="1b"),
        pytest.param(24, 2048, 16, 1_414_647_808, id="1.4b"),
        pytest.param(32, 2560, 32, 2_775_208_960, id="2.8b"),
    ],
)
def test_published_parameters(num_layers, dim, num_heads, published):
    """Ours and transformers' have as many as the paper counts, with the vocabulary padded to 50304."""
    shape = {"num_layers": num_layers, "dim": dim, "num_heads": num_heads, "head_dim": dim // num_heads}
    shape |= {"hidden": 4 * dim, "vocab_size": 50304}
    config = base.get_config().model
    config.unroll = 0
    config.update(BLOCK | {"position": "rope(fraction=0.25)", "residual": "parallel"})
    config.size = f"tiny({', '.join(f'{key}={value}' for key, value in shape.items())})"
    shapes = nn.unbox(model.abstract_params(from_config.from_config(config)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == published
    with torch.device("meta"):
        theirs = transformers.GPTNeoXForCausalLM(
            transformers.GPTNeoXConfig(
                vocab_size=50304,
                hidden_size=dim,
                intermediate_size=4 * dim,
                num_hidden_layers=num_layers,
                num_attention_heads=num_heads,
            )
        )
    assert sum(parameter.numel() for parameter in theirs.parameters()) == published
