"""Tuning of a vision-language model by one method: --config=configs/tune_vl.py:lora.

`config.model.pretrained` is a folder or a hub id of a vision-language model, or the folder of a run. By default
SmolLM2 is given a small vision tower of its own, which learns first (`vision`); that run's folder is then tuned.

Parts learn at rates of their own by factors of the schedule's, for example of `full`:
  --config.train.rates="(('^vision/projector/', 1.0), ('^vision/', 0.1), ('.*', 0.5))"
"""

from efficientllm import base_config

ADAPTERS = {
    "lora": "lora(rank=16, alpha=16)",
    "lora_plus": "lora_plus(rank=16, alpha=16)",
    "rslora": "rslora(rank=16, alpha=16)",
    "dora": "dora(rank=16, alpha=16)",
    "pissa": "pissa(rank=16, alpha=16)",
    "qlora": "lora(rank=16, alpha=16)",
    "freeze": "freeze(last=2)",
    "full": "full()",
    "projector": "freeze(train='^vision/projector/')",
    "vision": "freeze(train='^vision/')",
}
FORMS = {"qlora": "nf4(block=64)"}  # of the frozen kernels of the language model
RATES = {"full": 2e-5, "freeze": 2e-5, "projector": 1e-3, "vision": 1e-3}

TOWER = (
    "vit(num_layers=4, dim=256, num_heads=4, hidden=1024, projector_hidden=1024, patch=16, merge=2, "
    "position='rope(base=10000.0, sections=(16, 16), restart=True)')"
)


def get_config(name="lora"):
    config = base_config.get_config()
    config.name = f"tune_vl_{name}"
    config.task = "tune"
    config.plan.of = "tune"
    config.adapter = base_config.variant(ADAPTERS, name)
    config.quant = FORMS.get(name, "float32")
    config.model.pretrained = "smollm2-135m"
    config.model.embed = f"vision(tower={TOWER!r}, image_token=16)"
    config.tokenizer = "pretrained"
    config.data = "charts()"
    config.train.steps = 200
    config.train.batch_size = 4
    config.train.length = 256
    config.train.schedule = f"cosine(peak={RATES.get(name, 2e-4)}, warmup=0.1, final=0.1)"
    config.train.decay = ((".*", 0.0),)
    config.eval.every = 100
    config.eval.batches = 8
    config.checkpoint.every = 100
    config.sample.tokens = 0
    return config
