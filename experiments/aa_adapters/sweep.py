"""A/A test of the harness for adapters: LoRA against RSLoRA, which differ by a constant and so cost the same."""

from efficientllm.sweep import SHORT_RUNS, Sweep


def get_config():
    return Sweep(
        name="aa_adapters",
        baseline="lora",
        variants={name: ("configs/base.py", {"adapter": f"{name}(rank=16, alpha=32)"}) for name in ("lora", "rslora")},
        seeds=(0,),
        repeats=4,
        equal={"tokens": 0.0, "parameters": 0.0, "flops": 0.0},
        overrides=SHORT_RUNS | {"train.steps": 60, "eval.batches": 1},
    )
