"""The model: blocks of mixers and ffns, the backbone that repeats them, its parameters and its states of decoding."""

from efficientllm.model.backbone import Backbone, apply_group, half_layers, parts
from efficientllm.model.decoding_states import check_length, init_states, pin_states, state_axes
from efficientllm.model.parameters import ModelType, abstract_params, after_step, init_params, unroll

__all__ = [
    "Backbone",
    "ModelType",
    "abstract_params",
    "after_step",
    "apply_group",
    "check_length",
    "half_layers",
    "init_params",
    "init_states",
    "parts",
    "pin_states",
    "state_axes",
    "unroll",
]
