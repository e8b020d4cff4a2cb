"""The study's comparison of tuning methods: one effective batch, and a learning rate chosen for each method.

`models/` has the config.json of the study's seven models, which is enough for --dry_run. A run needs weights:
`--config.model.pretrained=meta-llama/Llama-3.2-1B`.
"""

from efficientllm.sweep import Sweep


def get_config():
    names = ("lora", "rslora", "dora", "pissa", "lora_plus", "freeze", "full")
    return Sweep(
        name="tuning_study",
        baseline="lora",
        variants={name: f"configs/tune_study.py:{name}" for name in names},
        overrides={"model.pretrained": "experiments/tuning/models/llama-3.2-1b"},
        equal={"tokens": 0.0},
        grid=("train.rates", tuple(f"(('.*', {factor}),)" for factor in (0.3, 1.0, 3.0))),
        twice=False,
    )
