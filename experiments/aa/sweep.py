"""A/A test of the harness: the baseline against itself, so that every difference is noise."""

from efficientllm.sweep import SHORT_RUNS, Sweep


def get_config():
    return Sweep(
        name="aa",
        baseline="gqa",
        variants={"gqa": "configs/base.py", "gqa_again": "configs/base.py"},
        seeds=(0,),
        repeats=12,
        equal={"tokens": 0.0, "parameters": 0.0, "flops": 0.0},
        overrides=SHORT_RUNS | {"train.steps": 60, "eval.batches": 1},
    )
