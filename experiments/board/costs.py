"""What the variants of the board cost, on a machine at rest: --config=experiments/board/costs.py:STUDY.

Short runs of the variants of the quality sweeps, under the same names, three randomised blocks. Losses of so few steps
say nothing; those of the quality sweeps stand beside these times in the board. Studies:

- those of pretrain.py: STUDY or STUDY-SIZE
- `tune`: the methods of tune.py
- `pictures`: the variants of pictures.py
- `infer-BATCHxPROMPT`, as in infer-16x128: the forms of infer.py that differ in what is stored, for requests of BATCH
  prompts of PROMPT tokens each
"""

import pathlib
import re

from efficientllm.errors import UserError
from efficientllm.registry.plugins import import_file
from efficientllm.sweep import Sweep

_HERE = pathlib.Path(__file__)
_pretrain, _tune, _infer, _pictures = (
    import_file(_HERE.with_name(f"{name}.py")) for name in ("pretrain", "tune", "infer", "pictures")
)
# How a method rounds changes no cost of its form.
FORMS = ("float32", "bfloat16", "float16", "int8", "int8_g32", "nf4", "int4", "int4_asym", "int4_table")
REQUEST = re.compile(r"infer-(\d+)x(\d+)")


def get_config(name="mixers-nano"):
    if request := REQUEST.fullmatch(name):
        batch_size, prompt_length = map(int, request.groups())
        return _cost_sweep(_infer.get_config("topics"), name, _requests(batch_size, prompt_length), FORMS)
    if name.startswith("infer"):
        raise UserError(f"{name!r}: name the requests' prompts and tokens: infer-1x128, infer-16x512")
    if name == "tune":
        return _cost_sweep(_tune.get_config("doc_pairs"), name, {"train.steps": 12, "eval.batches": 1})
    if name == "pictures":
        steps = {"train.steps": 40, "checkpoint.every": 0, "checkpoint.keep": 0}
        return _cost_sweep(_pictures.get_config(), name, steps)
    steps = {"train.steps": 6 if name.startswith("context") else 40, "eval.batches": 1, "checkpoint.every": 0}
    quality = _pretrain.get_config(name)
    return _cost_sweep(quality, quality.name.removeprefix("board_"), steps)


def _requests(batch_size, prompt_length):
    return {
        "infer.batch_size": batch_size,
        "infer.prompt_length": prompt_length,
        "infer.max_new_tokens": 32,
        "infer.repeats": 5,
        "eval.batches": 1,
    }


def _cost_sweep(quality, name, overrides, variants=()):
    """The cost sweep beside a quality sweep; of its `variants`, or of all."""
    return Sweep(
        name=f"board_costs_{name.replace('-', '_')}",
        measures="cost",
        baseline=quality.baseline,
        variants={key: value for key, value in quality.variants.items() if key in (variants or quality.variants)},
        equal=quality.equal,
        overrides=quality.overrides | overrides,
        twice=False,
    )
