"""Which quantization the weights of a checkpoint's files have, and how those of a run derive from them."""

import collections
import math
import typing

from efficientllm.convert.files import quantized
from efficientllm.registry import parse_spec

_FLOATS = ("F32", "F16", "BF16", "F64")
_PLAIN = ("float32", "bfloat16", "float16")


def stored_form(source: typing.Any) -> str | None:
    """The format of most quantized weights, such as `Q4_1` or `gptq`; None if all are floats."""
    quantization = source.config.get(quantized.KEY)
    if isinstance(quantization, dict):
        return quantization.get("quant_method")
    sizes: collections.Counter[str] = collections.Counter()
    for name, shape in source.tensors.shapes.items() if source.tensors else ():
        form = source.tensors.form(name)
        if len(shape) > 1 and form is not None and form not in _FLOATS:
            sizes[form] += math.prod(shape)
    return sizes.most_common(1)[0][0] if sizes else None


def history(source: typing.Any, spec: str) -> str:
    """Describes how weights of form `spec` derive from quantized files; "" if the files hold floats."""
    stored = source and stored_form(source)
    if not stored:
        return ""
    name, _ = parse_spec(spec, "config.quant")
    if name == "stored":
        return f"as the file holds them, {stored}"
    return f"dequantised from {stored}" if name in _PLAIN else f"rounded twice: {stored} in the file, then {spec}"
