"""Adapters that PEFT cannot load, and the methods that they are written as instead.

Experts are one array per layer in transformers 5; PEFT (0.19 and later) fuses the adapters of single experts when it
loads them: gate and up become one of twice the rank and twice the alpha, without magnitudes and without dropout.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable, Mapping

from efficientllm.convert.tensors.parameter_map import DiskTensor, bind_parameters
from efficientllm.errors import UserError
from efficientllm.registry import build

if typing.TYPE_CHECKING:
    from efficientllm.convert.source import Source

FROM_SCRATCH = "DiTTransformer2DModel"  # whose names the adapters of a diffusion model from scratch have
_STATE_SPACE = {
    "mixer.out_proj": "PEFT cannot adapt it",
    "mixer.dt_proj": "transformers reads its weight without PEFT's adapter",
}
_EXPERT = re.compile(r"\.experts\.\d+\.")
# (gate, up) of experts, and the endings that PEFT takes for experts' anywhere in the model.
_MIXTRAL = (("w1", "w3"), r"\.w[123]$")
_QWEN = (("gate_proj", "up_proj"), r"\.(gate|up|down)_proj$")
_EXPERTS = {"mixtral": _MIXTRAL} | dict.fromkeys(("qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"), _QWEN)


def table_of(source: Source) -> dict[str, tuple]:
    """The name table of a Source's family; of a diffusion model from scratch, that of diffusers' DiT.

    Raises UserError for another run from scratch, which has no family, and for one that is no DiT.
    """
    from efficientllm.convert.hf_config import families

    if (family := family_of(source)) is not None:
        return family.table
    lm = source.lm()
    if lm.reads != "images":
        raise UserError(f"{source.path} is not a model of transformers, and PEFT adapts no other")
    table = families.DENOISERS[FROM_SCRATCH].table
    bind_parameters(lm, table)
    return table


def family_of(source: Source) -> typing.Any:
    """The Family of a Source, or None for a model of this package."""
    from efficientllm.convert.hf_config import families

    adapted = families.FAMILIES | families.VISION | families.DENOISERS
    return families.find_family(source.config) if families.family_name(source.config) in adapted else None


def has_experts(modules: Iterable[str]) -> bool:
    """Whether experts are among the modules."""
    return any(map(_EXPERT.search, modules))


def written_method(method: typing.Any, tensors: Mapping[str, DiskTensor]) -> typing.Any:
    """The method to write `{module: DiskTensor}` as: the fallback where PEFT's would compute another function.

    PiSSA of one of several fused kernels is not PiSSA of the tensor; it is a LoRA of twice the rank, the trained
    product minus the initial one. RSLoRA is a LoRA with a larger alpha.
    """
    form, is_shared = method.peft, any(len(tensor.parts) > 1 for tensor in tensors.values())
    is_same = (form.experts or not has_experts(tensors)) and (form.parts or not is_shared)
    return method if is_same or form.fallback is None else build("adapter", form.fallback)


def check_supported(name: str, method: typing.Any, modules: Mapping[str, DiskTensor], model_type: str | None) -> None:
    """Raises UserError naming a module whose adapter PEFT refuses or would assign to another module.

    `name` is the method's; `modules` are `{module: DiskTensor}`.
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


def _check_experts(modules, pair, pattern):
    for module in modules:
        if not _EXPERT.search(module) and re.search(pattern, module):
            raise UserError(f"{module}: peft takes an adapter of that name for one of the experts'")
        head, _, name = module.rpartition(".")
        if name in pair and f"{head}.{pair[name == pair[0]]}" not in modules:
            raise UserError(f"{module}: peft adapts {' and '.join(pair)} of experts together or not at all")
