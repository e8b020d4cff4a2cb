"""The study's fine-tuning (arXiv:2505.13840, Section 4.2): --config=configs/tune_study.py:lora, or :lora+medical.

Rank, alpha, dropout and LoRA+'s ratio are those of its released code. Its effective batches differ by method (96, 32
and 64). Here they are equal.
"""

from efficientllm.config.presets import tune

DATA = {
    "o1": "pairs(path='O1-OPEN/OpenO1-SFT', hub=True, prompt='instruction', response='output', held_out=0.02)",
    "medical": "pairs(path='FreedomIntelligence/medical-o1-reasoning-SFT', hub=True, name='en', "
    "prompt='Question', response='Response', held_out=0.05)",
}


def get_config(name="lora"):
    method, _, data = name.partition("+")
    config = tune.get_config(method)
    config.name = f"tune_study_{name}"
    config.mesh = "fsdp=-1"
    config.model.pretrained = "meta-llama/Llama-3.2-1B"
    config.model.precision = "bfloat16"
    config.model.remat = "full"
    config.adapter = config.adapter.replace("alpha=128", "alpha=128, dropout=0.1")
    config.data = tune.base_config.variant(DATA, data or "o1")
    config.train.steps = 1000
    config.train.batch_size = 64
    config.train.length = 2048
    config.train.log_every = 10
    config.eval.every = 200
    config.eval.batches = 0
    config.checkpoint.every = 200
    return config
