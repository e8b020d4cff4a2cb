"""Training and inference on one GPU, with random weights: --config=experiments/gpu/sweep.py:STUDY.

Studies: `train_05b` (4 rows of 2,048 tokens), `infer_15b` (four forms), `train_15b` (one row of 8,192 tokens), and
`mixers_05b`, the other mixers in the setting of `train_05b`.
"""

from efficientllm import base_config
from efficientllm.sweep import Sweep

FORMS = ("bfloat16", "float16", "int8", "int4")
MOE = "moe(num_experts=8, top_k=2, load_balance=0.01, z_loss=0.001)"
ATTENTION = {name: f"configs/attention.py:{name}" for name in ("gqa", "mqa", "mla", "nsa")}
RECURRENT = {name: f"configs/mixers.py:{name}" for name in ("mamba", "mamba2", "rwkv")}
# The size, the rows and their length, and the variants; the first is the baseline.
TRAINING = {
    "train_05b": ("0.5b", 4, 2048, {"gqa": ATTENTION["gqa"], "mla": ATTENTION["mla"]}),
    "train_15b": ("1.5b", 1, 8192, {name: (ATTENTION | RECURRENT)[name] for name in ("gqa", "mla", "mamba2")}),
    "mixers_05b": (
        *("0.5b", 4, 2048),
        ATTENTION | RECURRENT | {"moe": ("configs/moe.py", {"model.ffn": MOE})},
    ),
}


def get_config(name="train_05b"):
    if name == "infer_15b":
        return _inference(name)
    size, batch_size, length, variants = base_config.variant(TRAINING, name)
    return Sweep(
        name=f"gpu_{name}",
        baseline=next(iter(variants)),
        variants=variants,
        seeds=(0,),
        equal={"tokens": 0.0},
        overrides={
            "model.size": size,
            "model.precision": "bfloat16",
            "mesh": "data=1",
            "tokenizer": "bytes",
            "train.steps": 30,
            "train.batch_size": batch_size,
            "train.length": length,
            "train.log_every": 10,
            "eval.every": 0,
            "eval.batches": 1,
            "checkpoint.every": 0,
            "checkpoint.keep": 0,
            "sample.tokens": 0,
        },
        twice=False,
    )


def _inference(name):
    return Sweep(
        name=f"gpu_{name}",
        baseline="bfloat16",
        variants={form: f"configs/infer.py:{form}" for form in FORMS},
        seeds=(0,),
        equal={"tokens": 0.0},
        overrides={
            "model.pretrained": "",
            "model.size": "1.5b",
            "model.tied": True,
            "model.precision": "bfloat16",
            "tokenizer": "bytes",
            "infer.chat": False,
            "infer.baseline": "",
            "infer.prompt_length": 512,
            "infer.max_new_tokens": 128,
        },
        twice=False,
    )
