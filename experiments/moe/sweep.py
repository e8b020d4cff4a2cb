"""Mixture of experts beside dense models of equal active and of equal total parameters."""

from efficientllm.sweep import SHORT_RUNS, Sweep

HIDDEN = 512  # of the dense ffn; the two active experts have half of it each


def get_config():
    dense = "swiglu(hidden={})"
    moe = f"moe(num_experts=8, top_k=2, hidden={HIDDEN // 2}, {{}})"
    return Sweep(
        name="moe",
        baseline="dense",
        variants={
            "dense": ("configs/base.py", {"model.ffn": dense.format(HIDDEN)}),
            "dense_large": ("configs/base.py", {"model.ffn": dense.format(4 * HIDDEN)}),
            "moe": ("configs/base.py", {"model.ffn": moe.format("load_balance=0.01")}),
            "moe_bias": ("configs/base.py", {"model.ffn": moe.format("bias_rate=0.001")}),
        },
        equal={"tokens": 0.0},
        overrides=SHORT_RUNS | {"model.size": "small", "train.steps": 40},
        twice=False,
    )
