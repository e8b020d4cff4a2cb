"""Models without attention, and Pythia, beside the Llama-like one of as many parameters."""

from efficientllm.sweep import Sweep


def get_config():
    names = ("mamba", "mamba2", "rwkv", "pythia")
    return Sweep(
        name="attention_free",
        baseline="gqa",
        variants={"gqa": "configs/attention.py:gqa"} | {name: f"configs/mixers.py:{name}" for name in names},
        equal={"tokens": 0.0, "parameters": 0.02},
        overrides={
            "model.size": "small",
            "train.steps": 24,
            "train.batch_size": 4,
            "eval.every": 0,
            "eval.batches": 16,
            "checkpoint.every": 0,
            "sample.tokens": 1,
        },
        twice=False,
    )
