"""The study's diffusion transformers on ImageNet latents of 256 pixels: --config=configs/dit_study.py:mla.

With --config.task=plan no data are needed. The recipe is DiT's (arXiv:2212.09748, Section 4), the attentions are those
of EfficientLLM (arXiv:2505.13840). Training needs a folder of pictures and an autoencoder:
--config.data="images(path='imagenet/train', size=256)" --config.autoencoder="kl(path='sd-vae')"
"""

from efficientllm import base_config

# NSA's blocks are squares of 4 x 4 patches; a compressed block and the window are twice as large.
VARIANTS = {
    "mha": {"mixer": "mha(qkv_bias=True, o_bias=True)"},
    "mqa": {"mixer": "mqa(qkv_bias=True, o_bias=True)"},
    "gqa": {"mixer": "gqa(qkv_bias=True, o_bias=True)"},
    "mla": {"mixer": "mla(kv_rank=144, rope_dim=0)"},
    "nsa": {"mixer": "nsa(compress_block=16, compress_stride=8, select_block=16, select_count=4, window=32)"},
    "moba": {"mixer": "moba(block=16, block_count=4)"},
    "moe": {"ffn": "moe(num_experts=8, top_k=2, load_balance=0.01, activation='gelu_tanh', use_bias=True)"},
}
TILES = {"nsa": 4, "moba": 4}


def get_config(variant="mha"):
    changes = VARIANTS["mha"] | base_config.variant(VARIANTS, variant)
    config = base_config.get_config()
    config.name = f"dit_study-{variant}"
    config.objective = "ddpm()"
    config.data = "images(path='imagenet/train', size=256)"
    config.model.size = "dit_xl2"
    tile = TILES.get(variant, 1)
    config.model.embed = f"patches(side=32, channels=4, classes=1000, learned_sigma=True, tile={tile})"
    config.model.modulation = "linear"
    config.model.position = "sincos2d"
    config.model.norm = "layernorm(affine=False)"
    config.model.ffn = "gelu(kind='tanh')"
    config.model.update(changes)
    config.train.steps = 400_000
    config.train.batch_size = 256
    config.train.ema = 0.9999
    config.train.optimizer = "adamw(b1=0.9, b2=0.999)"
    config.train.schedule = "constant(peak=0.0001)"
    config.train.clip = 0.0
    config.train.decay = ((".*", 0.0),)
    config.infer.solver = "ddpm(steps=250)"
    config.infer.guidance = 4.0
    config.infer.guidance_channels = 3
    return config
