"""Tuning methods on SmolLM2-135M, with the same records, batches and evaluation."""

from efficientllm.sweep import Sweep


def get_config():
    names = ("lora", "rslora", "dora", "pissa", "lora_plus", "qlora", "loha", "lokr", "glora", "freeze", "full")
    return Sweep(
        name="tuning",
        baseline="lora",
        variants={name: f"configs/tune.py:{name}" for name in names},
        equal={"tokens": 0.0},
        overrides={
            "train.steps": 12,
            "train.batch_size": 2,
            "train.length": 96,
            "eval.every": 0,
            "eval.batches": 2,
            "checkpoint.every": 12,
            "sample.tokens": 0,
        },
        twice=False,
    )
