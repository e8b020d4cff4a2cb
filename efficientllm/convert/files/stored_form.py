"""In which form a checkpoint's files hold its weights, and what becomes of them in another one."""

import collections
import math

from efficientllm.convert.files import quantized
from efficientllm.registry import parse_spec

_FLOATS = ("F32", "F16", "BF16", "F64")
_PLAIN = ("float32", "bfloat16", "float16")


def stored_form(source):
    """`Q4_1` or `gptq`: how the files hold most of the weights that are rounded; None where all are floats."""
    said = source.config.get(quantized.KEY)
    if isinstance(said, dict):
        return said.get("quant_method")
    if not hasattr(source.tensors, "form"):
        return None
    sizes = collections.Counter()
    for name, shape in source.tensors.shapes.items():
        if len(shape) > 1 and source.tensors.form(name) not in _FLOATS:
            sizes[source.tensors.form(name)] += math.prod(shape)
    return sizes.most_common(1)[0][0] if sizes else None


def history(source, spec):
    """What a form `spec` of this checkpoint's weights went through, or "" where its files hold floats."""
    stored = source and stored_form(source)
    if not stored:
        return ""
    name, _ = parse_spec(spec, "config.quant")
    if name == "stored":
        return f"as the file holds them, {stored}"
    return f"dequantised from {stored}" if name in _PLAIN else f"rounded twice: {stored} in the file, then {spec}"
