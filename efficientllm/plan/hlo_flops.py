"""FLOPs of the products in a compiled program, from the shapes in its HLO text; a multiply-add is two FLOPs.

Products with zeros count, as in `cost.jaxpr_flops`: masks are not halved, and padding of a convolution counts.
"""

import math
import re

from efficientllm.ops.attention_mask import flash_flops
from efficientllm.ops.native import flash
from efficientllm.ops.native import matmul as native
from efficientllm.plan.hlo_text import Instruction

PRODUCTS = ("dot", "ragged-dot", "convolution")
_DIMS = re.compile(r"\b(rhs_(?:contracting_dims|batch_dims|group_dims))=\{([\d,]*)\}")
_LABELS = re.compile(r"\bdim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"\bwindow=\{([^}]*)\}")
_CALLED = re.compile(r'custom_call_target="([^"]+)"')
# cuBLAS and oneDNN: `gemm` and `matmul` in their names. A GPU's backend config has the contracted axes.
_LIBRARY = re.compile(r"gemm|matmul|\bdot\b", re.IGNORECASE)
_CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
_FLASH = re.compile(r"is_causal = (true|false).*\bwindow = (\d+)")
_CONVOLUTION = re.compile(r"__cudnn\$conv(?:BiasActivation)?Forward")
# Kernels whose products the text does not show: of cuDNN, Pallas, Triton, and ours.
_OPAQUE = re.compile(r"cudnn|tpu_custom_call|mosaic|triton|efficientllm_", re.IGNORECASE)


def product_flops(computation: dict[str, Instruction], instruction: Instruction) -> float | None:
    """FLOPs of one run of an instruction of `computation`: 0 if it multiplies no matrices, None if it does not show."""
    if instruction.op in ("dot", "ragged-dot"):
        return _dot(computation, instruction)
    if instruction.op == "convolution":
        return _convolution(computation, instruction)
    return _custom_call(computation, instruction) if instruction.op.startswith("custom-call") else 0


def called(instruction: Instruction) -> str:
    """The target of a custom call; "" of another instruction."""
    match = _CALLED.search(instruction.text) if instruction.op.startswith("custom-call") else None
    return match[1] if match else ""


def is_product(instruction: Instruction) -> bool:
    """Whether an instruction outside of fusions is a matrix product or a convolution, also as a library's kernel."""
    if instruction.op in PRODUCTS:
        return True
    target = called(instruction)
    return bool(target in (native.TARGET, *native.ATTENTION) or _LIBRARY.search(target) or _CONVOLUTION.search(target))


def _custom_call(computation, instruction):
    target = called(instruction)
    if target in native.ATTENTION:
        q, v = (_shape(computation, instruction, operand) for operand in (0, 2))
        return flash_flops(q, v, *_flash_attributes(instruction.text), target == flash.GRADIENTS)
    if target == native.TARGET:
        return 2 * math.prod(_shape(computation, instruction, 0)) * instruction.arrays[0].shape[1]
    if _CONVOLUTION.match(target):
        return _convolution(computation, instruction)
    if _LIBRARY.search(target) and (contracted := _CONTRACTED.search(instruction.text)):
        axes = [int(axis) for axis in re.findall(r"\d+", contracted[1])]
        lhs = _shape(computation, instruction, 0)
        return 2 * math.prod(instruction.arrays[0].shape) * math.prod(lhs[axis] for axis in axes)
    return None if _LIBRARY.search(target) or _OPAQUE.search(target) else 0


def _flash_attributes(text):
    is_causal, window = _FLASH.search(text).groups()
    return is_causal == "true", int(window)


def _dot(computation, instruction):
    """Each element of the left side times the axes that only the right side has; its groups are not among them."""
    lhs, rhs = (_shape(computation, instruction, side) for side in (0, 1))
    shared = {int(axis) for _, axes in _DIMS.findall(instruction.text) for axis in axes.split(",") if axis}
    return 2 * math.prod(lhs) * math.prod(size for axis, size in enumerate(rhs) if axis not in shared)


def _convolution(computation, instruction):
    """Each element of the result times the kernel of its feature, as far as that meets elements of the input.

    A TPU writes batched products as convolutions over the batch axes, whose dilation leaves one element to be met.
    """
    _, kernel_labels, result_labels = _LABELS.search(instruction.text).groups()
    kernel, result = _shape(computation, instruction, 1), instruction.arrays[0].shape
    flops = 2 * math.prod(result) * math.prod(kernel) / kernel[kernel_labels.index("o")]
    lhs_labels, lhs = _LABELS.search(instruction.text)[1], _shape(computation, instruction, 0)
    for axis, window in enumerate(_windows(instruction.text)):
        sizes = (
            shape[labels.index(str(axis))]
            for shape, labels in ((lhs, lhs_labels), (kernel, kernel_labels), (result, result_labels))
        )
        flops *= _met(*sizes, **window)
    return flops


def _windows(text):
    """Of each spatial axis its `stride`, `low` padding and dilations."""
    match = _WINDOW.search(text)
    entries = dict(entry.split("=") for entry in match[1].split()) if match else {}
    axes = len(entries.get("size", "").split("x")) if "size" in entries else 0

    def of(key, default):
        return entries[key].split("x") if key in entries else [default] * axes

    columns = of("stride", "1"), of("pad", "0_0"), of("lhs_dilate", "1"), of("rhs_dilate", "1")
    return [
        {"stride": int(stride), "low": int(pad.split("_")[0]), "lhs_dilate": int(lhs), "rhs_dilate": int(rhs)}
        for stride, pad, lhs, rhs in zip(*columns, strict=True)
    ]


def _met(size, kernel, result, stride, low, lhs_dilate, rhs_dilate):
    """The share of (result, kernel) pairs on an axis of a dilated input that meet an element of it; 1 on others."""
    if lhs_dilate == 1 or rhs_dilate > 1:
        return 1
    starts = (at * stride - low for at in range(result))
    met = (
        -(-min(start + kernel, size * lhs_dilate) // lhs_dilate) - -(-max(start, 0) // lhs_dilate) for start in starts
    )
    return sum(max(0, count) for count in met) / (result * kernel)


def _shape(computation, instruction, operand):
    return computation[instruction.operands[operand]].arrays[0].shape
