"""A small vision-language model that reads handwritten digits, as a check that learning goes through its tower.

Both parts begin at random. After 150 steps, a minute or two on two cores, it answers over 95 % of the held-out
questions exactly.
"""

from efficientllm import base_config

# 4 x 4 patches, of which 2 x 2 become one token.
TOWER = (
    "vit(num_layers=2, dim=96, num_heads=4, hidden=192, projector_hidden=192, patch=14, merge=2, "
    "position='rope(base=100.0, sections=(6, 6), restart=True)')"
)
SIZE = "custom(num_layers=2, dim=96, num_heads=4, num_kv_heads=4, head_dim=24, hidden=192, rope_base=1e4)"


def get_config():
    config = base_config.get_config()
    config.name = "digits_vl"
    config.model.size = SIZE
    config.model.embed = f"vision(tower={TOWER!r}, image_token=0)"
    config.tokenizer = "bytes"
    config.data = "asked(of='digits()', question='Which digit?', held_out=0.2)"
    config.train.steps = 150
    config.train.batch_size = 8
    config.train.length = 256
    config.train.schedule = "cosine(peak=0.003, warmup=0.1, final=0.1)"
    config.eval.every = 75
    config.eval.batches = 0
    config.checkpoint.every = 150
    config.sample.tokens = 0
    return config
