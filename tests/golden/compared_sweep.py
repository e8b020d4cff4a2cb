"""Sweep for the golden case of a dry run."""

from efficientllm.sweep import Sweep
from golden.cases import WITH_VOCABULARY


def get_config():
    return Sweep(
        name="golden",
        variants={
            "gqa": "attention:gqa",
            "mla": ("base", {"model.mixer": "mla(kv_rank=16, rope_dim=8)"}),
            "lora": ("base", {"adapter": "lora(rank=4)"}),
        },
        baseline="gqa",
        seeds=(0, 1),
        overrides={"model.size": WITH_VOCABULARY, "train.length": 32, "train.steps": 3},
        equal={"tokens": 0.0},
    )
