"""What the variants of the board cost, on a machine at rest: --config=experiments/board/costs.py:STUDY or STUDY-SIZE.

Short runs of the variants of pretrain.py, under the same names, three randomised blocks. Losses of so few steps say
nothing; those of pretrain.py stand beside these times in the board.
"""

import pathlib

from efficientllm.registry.plugins import import_file
from efficientllm.sweep import Sweep

_quality = import_file(pathlib.Path(__file__).with_name("pretrain.py"))


def get_config(name="mixers-nano"):
    quality = _quality.get_config(name)
    steps = 6 if name.startswith("context") else 40
    return Sweep(
        name=quality.name.replace("board", "board_costs"),
        measures="cost",
        baseline=quality.baseline,
        variants=quality.variants,
        equal=quality.equal,
        overrides=quality.overrides | {"train.steps": steps, "eval.batches": 1, "checkpoint.every": 0},
        twice=False,
    )
