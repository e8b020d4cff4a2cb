"""Seven positions in the same model, on the same tokens."""

from efficientllm.sweep import Sweep


def get_config():
    names = ("rope", "sinusoidal", "learned", "relative", "t5", "alibi", "none")
    return Sweep(
        name="position",
        baseline="rope",
        variants={name: f"configs/position.py:{name}" for name in names},
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
