"""Six attentions and a mixture of experts of a diffusion transformer on letters, at equal parameters and pictures."""

from efficientllm.sweep import Sweep


def get_config():
    return Sweep(
        name="dit",
        baseline="mha",
        variants={name: f"configs/dit.py:{name}" for name in ("mha", "mqa", "gqa", "mla", "nsa", "moba", "moe")},
        equal={"tokens": 0.0},
        # 21 runs in half an hour of two cores. The average has a shorter memory than configs/dit.py's: 0.99 would still
        # hold 5 % of the first parameters after 300 steps.
        overrides={
            "train.steps": 300,
            "train.batch_size": 16,
            "train.ema": 0.98,
            "eval.every": 0,
            "eval.batches": 0,
            "checkpoint.every": 0,
            "checkpoint.keep": 0,
        },
        twice=False,
    )
