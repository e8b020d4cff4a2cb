"""Seven kinds of attention at equal parameters and tokens."""

from efficientllm.sweep import SHORT_RUNS, Sweep


def get_config():
    return Sweep(
        name="attention",
        baseline="gqa",
        variants={
            name: f"configs/attention.py:{name}" for name in ("mha", "mqa", "gqa", "mla", "nsa", "window", "moba")
        },
        equal={"tokens": 0.0, "parameters": 0.02},
        overrides=SHORT_RUNS | {"model.size": "small", "train.steps": 24},
        twice=False,
    )
