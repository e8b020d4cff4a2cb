"""Pre-training to 20 tokens a parameter, for quality: --config=experiments/board/pretrain.py:STUDY or STUDY-SIZE.

Studies: `rates` (learning rates of representative variants), `mixers`, `positions`, `experts`, and `context` (rows of
4,096 tokens). Sizes: nano (0.2M parameters), micro (0.5M), tiny (0.9M); of `mixers`, the first has all, the
others have the most telling four.
"""

import dataclasses

from efficientllm import base_config
from efficientllm.sweep import Sweep


@dataclasses.dataclass(frozen=True)
class Scale:
    """Tokens of a run, 20 for each parameter, and the peak learning rate, chosen by the study `rates`."""

    steps: int
    rate: float
    batch_size: int = 16
    length: int = 256


SCALES = {"nano": Scale(1040, 1e-2), "micro": Scale(2640, 6e-3), "tiny": Scale(4500, 4e-3)}
ATTENTION = ("gqa", "mha", "mqa", "mla", "nsa", "window", "moba")
MIXERS = {
    **{name: f"configs/attention.py:{name}" for name in ATTENTION},
    **{name: f"configs/mixers.py:{name}" for name in ("mamba", "mamba2", "pythia")},
    "rwkv": ("configs/mixers.py:rwkv", {"model.mixer": "rwkv(head_dim=32)"}),
    "hybrid": ("configs/attention.py:gqa", {"model.pattern": ("mamba | swiglu", "mamba | swiglu", "gqa | swiglu")}),
}
LADDER = ("gqa", "mqa", "mla", "rwkv")
# At 4,096 tokens the sparse kinds have the block sizes and windows of an eighth of what their papers use for 32k.
CONTEXT = {
    **{name: MIXERS[name] for name in ("gqa", "mqa", "mla", "mamba2", "rwkv")},
    "nsa": (
        "configs/attention.py:nsa",
        {
            "model.mixer": "nsa(compress_block=16, compress_stride=8, select_block=32, select_count=16, window=256)",
        },
    ),
    "window": ("configs/attention.py:window", {"model.mixer": "window(window=512)"}),
    "moba": ("configs/attention.py:moba", {"model.mixer": "moba(block=256, block_count=3)"}),
}
POSITIONS = ("rope", "sinusoidal", "learned", "relative", "t5", "alibi", "none")


def mixers(scale):
    """All of them at the smallest size, the most telling ones at the larger."""
    return MIXERS if scale == "nano" else {name: MIXERS[name] for name in LADDER}


def rates(scale):
    """Four variants that learn differently, at three rates each."""
    variants = {}
    for name, entry in ({name: MIXERS[name] for name in ("gqa", "mamba", "rwkv")} | experts(scale)).items():
        if name in ("gqa", "mamba", "rwkv", "moe_active"):
            file, overrides = (entry, {}) if isinstance(entry, str) else entry
            for rate in (3e-3, 1e-2, 3e-2):
                variants[f"{name}-{rate:g}"] = (file, overrides | {"train.schedule": _schedule(rate)})
    return variants


def experts(scale):
    """Mixtures of equal active, and of equal total, parameters beside the dense model."""
    hidden = {"nano": 192, "micro": 288, "tiny": 384}[scale]
    moe = "moe(num_experts=8, top_k=2, hidden={}, load_balance=0.01, z_loss=0.001)"
    return {
        "dense": ("configs/base.py", {"model.ffn": f"swiglu(hidden={hidden})"}),
        "moe_active": ("configs/base.py", {"model.ffn": moe.format(hidden // 2)}),
        "moe_total": ("configs/base.py", {"model.ffn": moe.format(hidden // 8)}),
        "dense_large": ("configs/base.py", {"model.ffn": f"swiglu(hidden={4 * hidden})"}),
    }


# The variants of each study, its baseline, and what must be equal.
STUDIES = {
    "rates": (rates, "gqa-0.01", {"tokens": 0.0}),
    "mixers": (mixers, "gqa", {"tokens": 0.0, "parameters": 0.04}),
    "positions": (lambda scale: {name: f"configs/position.py:{name}" for name in POSITIONS}, "rope", {"tokens": 0.0}),
    "experts": (experts, "dense", {"tokens": 0.0}),
    "context": (lambda scale: CONTEXT, "gqa", {"tokens": 0.0, "parameters": 0.04}),
}


def _schedule(rate):
    return f"cosine(peak={rate:g}, warmup=0.05, final=0.1)"


def get_config(name="mixers-nano"):
    study, _, size = name.partition("-")
    variants, baseline, equal = base_config.variant(STUDIES, study)
    size = size or "nano"
    scale = base_config.variant(SCALES, size)
    overrides = {
        "model.size": size,
        "tokenizer": "bpe(vocab_size=1024)",
        "train.steps": scale.steps,
        "train.batch_size": scale.batch_size,
        "train.length": scale.length,
        "train.schedule": _schedule(scale.rate),
        "train.log_every": 20,
        "eval.every": 0,
        "eval.batches": 40,
        "checkpoint.every": 200,
        "checkpoint.keep": 1,
        "sample.tokens": 0,
    }
    if study == "context":
        overrides |= {"train.length": 4096, "train.batch_size": 1, "eval.batches": 40}
    return Sweep(
        name=f"board_{study}_{size}",
        measures="quality",
        baseline=baseline,
        variants=variants(size),
        seeds=(0,) if study == "rates" else (0, 1, 2),
        equal=equal,
        overrides=overrides,
        twice=False,
        timeout_s=6 * 3600.0,
    )
