"""Seven position encodings in one model, on the same tokens."""

from efficientllm.sweep import SHORT_RUNS, Sweep


def get_config():
    names = ("rope", "sinusoidal", "learned", "relative", "t5", "alibi", "none")
    return Sweep(
        name="position",
        baseline="rope",
        variants={name: f"configs/position.py:{name}" for name in names},
        equal={"tokens": 0.0, "parameters": 0.02},
        overrides=SHORT_RUNS | {"model.size": "small", "train.steps": 24},
        twice=False,
    )
