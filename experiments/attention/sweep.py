"""Seven kinds of attention with the parameters of one, on the same tokens."""

from efficientllm.sweep import Sweep


def get_config():
    return Sweep(
        name="attention",
        baseline="gqa",
        variants={
            name: f"configs/attention.py:{name}" for name in ("mha", "mqa", "gqa", "mla", "nsa", "window", "moba")
        },
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
