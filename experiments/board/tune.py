"""Tuning SmolLM2-135M for quality: --config=experiments/board/tune.py:TASK, or ranks-TASK.

Tasks: `doc_pairs` (questions about the Python library, with their docstrings) and `sums` (additions, whose answers are
right or wrong). Eleven methods at rank 16, or LoRA against RSLoRA at ranks 4 to 256; each variant at three learning
rates around its own, the best of which runs with three seeds. `eval_loss_also` is the loss on English prose that no
task has, so that `untuned`, the model as it was, says what each method forgets.
"""

import dataclasses

from efficientllm import base_config
from efficientllm.sweep import Sweep


@dataclasses.dataclass(frozen=True)
class Task:
    """Records, and the rows that hold them."""

    data: str
    steps: int
    batch_size: int
    length: int
    eval_batches: int


TASKS = {
    "doc_pairs": Task("doc_pairs()", steps=48, batch_size=4, length=128, eval_batches=16),
    "sums": Task("sums(digits=3)", steps=48, batch_size=4, length=112, eval_batches=16),  # four records a row
}
RANK, ALPHA = 16, 16
ADAPTERS = {
    **{name: f"{name}(rank={RANK}, alpha={ALPHA})" for name in ("lora", "rslora", "dora", "pissa", "loha", "lokr")},
    "lora_plus": f"lora_plus(rank={RANK}, alpha={ALPHA}, ratio=16)",
    "qlora": f"lora(rank={RANK}, alpha={ALPHA})",
    "glora": f"glora(rank={RANK})",
    "freeze": "freeze(last=4)",
    "full": "full()",
}
# Peak learning rates in the middle of each method's grid.
RATES = {"full": 5e-5, "freeze": 2e-4, "pissa": 2e-4, "lora_plus": 2e-4, "lokr": 2e-3, "loha": 1e-3}
RATE = 5e-4
FACTORS = (0.25, 1.0, 4.0)
RANKS = (4, 16, 64, 256)


def methods():
    """The eleven methods, and the model as it was."""
    variants = {
        name: (f"configs/tune.py:{name}", {"adapter": adapter, "train.schedule": _schedule(RATES.get(name, RATE))})
        for name, adapter in ADAPTERS.items()
    }
    still = {"adapter": ADAPTERS["lora"], "train.schedule": "constant(peak=0.0)", "train.steps": 1}
    return variants | {"untuned": ("configs/tune.py:lora", still)}


def ranks():
    """Two scales of the same adapter: alpha / rank, and alpha / sqrt(rank)."""
    return {
        f"{name}_{rank}": (
            f"configs/tune.py:{name}",
            {"adapter": f"{name}(rank={rank}, alpha={ALPHA})", "train.schedule": _schedule(RATE)},
        )
        for name in ("lora", "rslora")
        for rank in RANKS
    }


def _schedule(rate):
    return f"cosine(peak={rate:g}, warmup=0.05, final=0.1)"


def get_config(name="doc_pairs"):
    ladder, _, of_ladder = name.rpartition("-")
    task = base_config.variant(TASKS, of_ladder)
    variants = base_config.variant({"": methods, "ranks": ranks}, ladder)()
    return Sweep(
        name=f"board_tune_{name.replace('-', '_')}",
        measures="quality",
        baseline="lora_16" if ladder else "lora",
        variants=variants,
        overrides={
            "data": task.data,
            "model.precision": "mixed",  # 2.0 s a step, in float32 3.4: a core of an AMD EPYC, Zen 4, 2026-11-30
            "train.steps": task.steps,
            "train.batch_size": task.batch_size,
            "train.length": task.length,
            "train.log_every": 5,
            "eval.every": 0,
            "eval.batches": task.eval_batches,
            "eval.also": "python_docs(kind='topics', held_out=0.8)",
            "checkpoint.every": 0,
            "checkpoint.keep": 0,
            "sample.tokens": 0,
        },
        grid=("train.rates", tuple(f"(('.*', {factor}),)" for factor in FACTORS)),
        twice=False,
    )
