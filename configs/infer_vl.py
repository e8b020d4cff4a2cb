"""Inference with a vision-language model: --config=configs/infer_vl.py:bfloat16 --config.model.pretrained=FOLDER.

`config.infer.prompts` names a .jsonl file, whose lines hold `prompt` and `image`. The tower keeps its own type.
"""

from efficientllm.config.presets import infer


def get_config(name="bfloat16"):
    config = infer.get_config(name)
    config.name = f"infer_vl_{name}"
    config.model.pretrained = "Qwen/Qwen2.5-VL-3B-Instruct"
    if name in ("int8", "int4", "nf4"):
        config.infer.rules = (("^vision/", "bfloat16"),)
    return config
