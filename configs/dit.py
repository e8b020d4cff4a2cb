"""Diffusion transformers that learn letters on any machine, one for each attention: --config=configs/dit.py:mla.

The letters are those of matplotlib's fonts, without an autoencoder. All attentions have mha's number of parameters; the
mixture has as many for each token.
"""

from efficientllm import base_config

# Blocks of 4 tokens are squares of 2 x 2 patches. The defaults of the specs are the papers', for longer rows.
VARIANTS = {
    "mha": {"mixer": "mha(qkv_bias=True, o_bias=True)"},
    "mqa": {"mixer": "mqa(qkv_bias=True, o_bias=True)"},
    "gqa": {"mixer": "gqa(num_kv_heads=2, qkv_bias=True, o_bias=True)"},
    "mla": {"mixer": "mla(rope_dim=0)"},
    "nsa": {"mixer": "nsa(compress_block=8, compress_stride=4, select_block=4, select_count=4, window=16)", "tile": 2},
    "moba": {"mixer": "moba(block=4, block_count=4)", "tile": 2},
    "moe": {
        "ffn": "moe(num_experts=8, top_k=2, hidden=256, load_balance=0.01, activation='gelu_tanh', use_bias=True)",
        "parameters_of": "",
    },
}


def get_config(variant="mha"):
    changes = VARIANTS["mha"] | base_config.variant(VARIANTS, variant)
    config = base_config.get_config()
    config.name = f"dit-{variant}"
    config.objective = "flow()"
    config.data = "glyphs(size=32, channels=1)"
    config.model.size = "dit_tiny4"
    config.model.embed = f"patches(tile={changes.pop('tile', 1)})"
    config.model.modulation = "linear"
    config.model.position = "sincos2d"
    config.model.norm = "layernorm(affine=False)"
    config.model.ffn = "gelu(kind='tanh')"
    config.model.parameters_of = VARIANTS["mha"]["mixer"]
    config.model.update(changes)
    config.train.steps = 800
    config.train.batch_size = 32
    config.train.ema = 0.99
    config.train.schedule = "cosine(peak=0.002, warmup=0.05, final=0.05)"
    config.eval.every = 400
    config.eval.batches = 4
    config.checkpoint.every = 400
    config.infer.solver = "euler(steps=28)"
    config.infer.guidance = 2.0
    return config
