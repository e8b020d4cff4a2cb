"""Mamba, Mamba-2, RWKV and Pythia beside the Llama-like baseline of equal parameters."""

from efficientllm.sweep import SHORT_RUNS, Sweep


def get_config():
    names = ("mamba", "mamba2", "rwkv", "pythia")
    return Sweep(
        name="attention_free",
        baseline="gqa",
        variants={"gqa": "configs/attention.py:gqa"} | {name: f"configs/mixers.py:{name}" for name in names},
        equal={"tokens": 0.0, "parameters": 0.02},
        overrides=SHORT_RUNS | {"model.size": "small", "train.steps": 24},
        twice=False,
    )
