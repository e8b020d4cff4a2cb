"""Held-out loss of every form and method of rounding: --config=experiments/board/infer.py:KIND, or ladder-SIZE-MIXER.

Kinds of text, which SmolLM2-135M is scored on: `topics` (English prose), `sources` (Python) and `answers` (to questions
in its chat format). `ladder-SIZE-MIXER` scores a model that pretrain.py:mixers-SIZE has trained, by default gqa's, on
what it held out.

Rounding to the nearest has no seed, and what the methods are calibrated on is the same for all: one block. The row
gives the loss of each of the 40 rows of text, so that two forms are compared row by row.
"""

import glob

from efficientllm import base_config
from efficientllm.errors import UserError
from efficientllm.sweep import Sweep

# None of the text that is scored is calibrated on.
KINDS = {
    "topics": "python_docs(kind='topics', held_out=0.8)",
    "sources": "python_docs(kind='sources', held_out=0.8, max_bytes=1000000)",
    "answers": "doc_pairs(held_out=0.8)",
}
FORMS = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "int8": "int8",
    "int8_g32": "int8(group=32)",
    "nf4": "nf4",
    "int4": "int4",
    "int4_asym": "int4(symmetric=False)",
    "int4_awq": "int4(method='awq')",
    "int4_gptq": "int4(method='gptq')",
    "int4_awq_asym": "int4(method='awq', symmetric=False)",
    "int4_gptq_asym": "int4(method='gptq', symmetric=False)",
    "int4_g64": "int4(group=64)",
    "int4_g64_gptq": "int4(group=64, method='gptq')",
    "int4_table": "int4(embedding='int4')",
    "int4_table_gptq_asym": "int4(embedding='int4', method='gptq', symmetric=False)",
}


def get_config(name="topics"):
    study, _, variant = name.partition("-")
    model = trained(*variant.split("-")) if study == "ladder" else {"data": base_config.variant(KINDS, study)}
    return Sweep(
        name=f"board_infer_{name.replace('-', '_')}",
        measures="quality",
        baseline="float32",
        variants={form: ("configs/infer.py:float32", {"quant": spec}) for form, spec in FORMS.items()},
        seeds=(0,),
        equal={"parameters": 0.0, "tokens": 0.0},
        overrides={
            "train.batch_size": 1,  # a row of text
            "train.length": 256,
            "eval.batches": 40,
            "infer.baseline": "",  # the report takes MCR from the rows
            "infer.prompt_length": 32,
            "infer.max_new_tokens": 8,
            "infer.repeats": 1,
            **model,
        },
        twice=False,
    )


def trained(size, mixer="gqa"):
    """The overrides of a run of pretrain.py:mixers-SIZE, of the first seed."""
    pattern = f"runs/board/mixers-{size}/00-*-{mixer}-*/record.json"
    if not (rows := glob.glob(pattern)):
        raise UserError(f"{pattern}: no such run; run the sweep experiments/board/pretrain.py:mixers-{size} first")
    return {"model.pretrained": rows[0].removesuffix("/record.json"), "infer.chat": False}
