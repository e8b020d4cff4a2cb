"""What peft cannot hold of ours, and the method that it is written as where peft's own would be another function.

Experts are one array a layer in transformers 5; peft (0.19 and later) puts adapters of single experts together when it
loads them: gate and up as one of twice the rank, whose alpha it doubles too, without magnitudes and without dropout.
"""

import re

from efficientllm.errors import UserError
from efficientllm.registry import build

_STATE_SPACE = {
    "mixer.out_proj": "peft has no adapter of it",
    "mixer.dt_proj": "transformers takes its weight past peft's adapter",
}
_EXPERT = re.compile(r"\.experts\.\d+\.")
# Of experts, (gate, up) and names that peft takes for theirs wherever they stand.
_MIXTRAL = (("w1", "w3"), r"\.w[123]$")
_QWEN = (("gate_proj", "up_proj"), r"\.(gate|up|down)_proj$")
_EXPERTS = {"mixtral": _MIXTRAL} | dict.fromkeys(("qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"), _QWEN)


def table_of(source):
    """The name table of a Source's tensors in transformers. Raises UserError for a run from scratch, which has none."""
    from efficientllm.convert.hf_config import families

    if source.config.get("model_type") not in families.FAMILIES:
        raise UserError(f"{source.path} is no model of transformers, whose modules alone peft adapts")
    return families.FAMILIES[source.config["model_type"]].table


def has_experts(modules):
    """Whether experts are among the modules."""
    return any(map(_EXPERT.search, modules))


def written_method(method, tensors):
    """The method of the folder for `{module: OnDisk}`: the fallback where PEFT's own would be another function.

    PiSSA of a part of a tensor is not that of the tensor; it is a LoRA of twice the rank, of what was learnt and less
    what it was at first. RSLoRA is a LoRA whose alpha is larger.
    """
    form, parts = method.peft, any(len(tensor.parts) > 1 for tensor in tensors.values())
    is_same = (form.experts or not has_experts(tensors)) and (form.parts or not parts)
    return method if is_same or form.fallback is None else build("adapter", form.fallback)


def check(name, method, modules, model_type):
    """Raises UserError naming a module whose adapter peft refuses or would take for another's.

    `name` is that of the method; `modules` are `{module: OnDisk}`.
    """
    for module, tensor in modules.items():
        if not method.peft.experts and _EXPERT.search(module):
            raise UserError(f"{module}: peft has no {name} of experts")
        if not method.peft.parts and len(tensor.parts) > 1:
            raise UserError(f"{module}: peft has no {name} of a part of a tensor, which this kernel is")
    if model_type in ("mamba", "mamba2"):
        for module in modules:
            for name, why in _STATE_SPACE.items():
                if module.endswith(name):
                    raise UserError(f"{module}: {why}; a target without it has a folder")
    if model_type in _EXPERTS:
        _check_experts(modules, *_EXPERTS[model_type])


def _check_experts(modules, pair, alike):
    for module in modules:
        if not _EXPERT.search(module) and re.search(alike, module):
            raise UserError(f"{module}: peft takes an adapter of that name for one of the experts'")
        head, _, name = module.rpartition(".")
        if name in pair and f"{head}.{pair[name == pair[0]]}" not in modules:
            raise UserError(f"{module}: peft adapts {' and '.join(pair)} of experts together or not at all")
