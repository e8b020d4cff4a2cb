"""Wan 2.1, text to video, on latents of clips: --config=configs/wan.py:1.3b. `tiny` runs on any machine.

Without `config.model.pretrained` the weights are random: times, bytes and plans are real.
"""

from efficientllm import base_config

ATTENTION = "qkv_bias=True, o_bias=True, qk_norm='all', norm='rmsnorm(eps=1e-06)'"
ROPE = "restart=True, interleaved=True, table=1024"
VARIANTS = {
    "1.3b": {"size": "wan_1.3b"},
    "14b": {"size": "wan_14b"},
    "tiny": {
        "size": "wan_1.3b(num_layers=3, dim=64, num_heads=4, num_kv_heads=4, head_dim=16, hidden=160)",
        "position": f"rope(sections=(4, 2, 2), {ROPE})",
        "embed": "patches(size=(3, 8, 12), any_size=True, channels=16, classes=0, text_length=16, text_dim=32)",
    },
}


def get_config(variant="1.3b"):
    changes = base_config.variant(VARIANTS, variant)
    config = base_config.get_config()
    config.name = f"wan-{variant}"
    config.objective = "flow(shift=3.0)"
    # Latents of 81 frames of 480 x 832, and 512 tokens of UMT5.
    config.model.embed = (
        "patches(size=(21, 60, 104), any_size=True, channels=16, classes=0, text_length=512, text_dim=4096)"
    )
    config.model.pattern = (
        f"mha({ATTENTION}) | none",
        f"cross({ATTENTION}, input_norm='layernorm(eps=1e-06)') | gelu(kind='tanh')",
    )
    config.model.position = f"rope(sections=(22, 21, 21), {ROPE})"
    config.model.norm = "layernorm(affine=False)"
    config.model.modulation = "table"
    config.model.update(changes)
    config.infer.solver = "unipc(steps=50)"
    config.infer.guidance = 5.0
    return config
