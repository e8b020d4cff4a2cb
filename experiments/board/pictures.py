"""Attentions and a mixture of experts in a diffusion transformer on letters: --config=experiments/board/pictures.py.

The variants of experiments/dit/sweep.py, for their held-out loss; costs.py:pictures measures what they cost.
"""

import dataclasses
import pathlib

from efficientllm.registry.plugins import import_file
from efficientllm.sweep import Sweep


def get_config() -> Sweep:
    dit = import_file(pathlib.Path(__file__).parents[1] / "dit" / "sweep.py").get_config()
    overrides = dit.overrides | {"train.log_every": 20, "checkpoint.every": 100, "checkpoint.keep": 1}
    return dataclasses.replace(dit, name="board_pictures", measures="quality", overrides=overrides)
