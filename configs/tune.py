"""Fine-tuning of a pretrained model by one method: --config=configs/tune.py:rslora.

Batch, tokens and evaluation are the same for every method.
"""

from efficientllm import base_config

ADAPTERS = {
    "lora": "lora(rank=64, alpha=128)",
    "rslora": "rslora(rank=64, alpha=128)",
    "dora": "dora(rank=64, alpha=128)",
    "pissa": "pissa(rank=64, alpha=128)",
    "lora_plus": "lora_plus(rank=64, alpha=128, ratio=16)",
    "qlora": "lora(rank=64, alpha=128)",
    "loha": "loha(rank=16, alpha=16)",
    "lokr": "lokr(rank=16, alpha=16)",
    "glora": "glora(rank=16)",
    "freeze": "freeze(last=4)",
    "full": "full()",
}
FORMS = {"qlora": "nf4(block=64)"}  # of the frozen kernels
# Pretrained weights that are trained themselves need smaller steps than adapters.
RATES = {"full": 2e-5, "freeze": 5e-5}


def get_config(name="lora"):
    config = base_config.get_config()
    config.name = f"tune_{name}"
    config.task = "tune"
    config.plan.of = "tune"
    config.model.pretrained = "smollm2-135m"
    config.adapter = base_config.variant(ADAPTERS, name)
    config.quant = FORMS.get(name, "float32")
    config.data = "doc_pairs()"
    config.tokenizer = "pretrained"
    config.train.steps = 40
    config.train.batch_size = 4
    config.train.length = 256
    config.train.log_every = 1
    config.train.schedule = f"cosine(peak={RATES.get(name, 2e-4)}, warmup=0.1, final=0.1)"
    config.train.decay = ((".*", 0.0),)
    config.eval.every = 20
    config.eval.batches = 8
    config.checkpoint.every = 20
    config.sample.prompt = "What does `json.dumps(obj, indent=None)` do?"
    config.sample.tokens = 48
    return config
