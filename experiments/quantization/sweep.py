"""Quantized forms of SmolLM2-135M: bytes, latency, throughput, held-out loss and compression rate (MCR)."""

from efficientllm.sweep import Sweep


def get_config():
    forms = {name: f"configs/infer.py:{name}" for name in ("float32", "bfloat16", "float16", "int8", "nf4")}
    for method in ("rtn", "awq", "gptq"):
        forms[f"int4_{method}"] = ("configs/infer.py:int4", {"quant": f"int4(method='{method}')"})
    return Sweep(
        name="quantization",
        baseline="bfloat16",
        variants=forms,
        equal={"parameters": 0.0, "tokens": 0.0, "flops": 0.0},
        overrides={
            "model.precision": "float32",  # of products: weights alone differ
            "infer.prompt_length": 512,
            "infer.max_new_tokens": 128,
            "infer.repeats": 3,
            "train.length": 512,
            "eval.batches": 4,
        },
    )
