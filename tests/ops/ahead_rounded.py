"""Ahead-of-time compilation of prefill and decode with quantized weights for absent hardware.

`ahead_rounded.py tpu|gpu FORM MESH [FFN]`

Prints what products run on, each program's arrays of floats with as many elements as some rounded kernel has, or the
part of it that a device holds, those of prefill with as many as two of the largest have, and the elements of the
largest array that a program gathers.
"""

import json
import math
import sys

import ahead  # ahead of JAX: it names the platform
import flax.linen as nn
import jax

from configs import base
from efficientllm import model, sharding
from efficientllm.architecture import from_config
from efficientllm.infer.engine import Engine
from efficientllm.infer.samplers import Greedy
from efficientllm.plan import hlo_text
from efficientllm.quant import apply
from efficientllm.runtime import kernel_choice
from efficientllm.weights import Weight, box_as

LENGTH, PROMPT, VOCABULARY = 128, 64, 640  # no table has the size of a kernel


def programs(lm, params, rows):
    engine = Engine(lm, params, Greedy(), -1, LENGTH)
    prefill, _ = engine.trace_prefill(rows, PROMPT)
    return {"prefill": prefill.lower().compile(), "decode": engine.trace_decode(rows).lower().compile()}


def floats(program, sizes):
    """Arrays of floats of one of `sizes`, within fusions too, as `dtype[shape]`."""
    arrays = [
        array for instruction in hlo_text.Program(program.as_text()).instructions() for array in instruction.arrays
    ]
    large = {(x.dtype, x.shape) for x in arrays if "f" in x.dtype and math.prod(x.shape) in sizes}
    return sorted(f"{dtype}{list(shape)}" for dtype, shape in large)


def gathered(program):
    """Elements of the largest array that an all-gather makes."""
    all_gathers = (
        instruction
        for instruction in hlo_text.Program(program.as_text()).instructions()
        if instruction.op.startswith("all-gather")
    )
    return max((math.prod(array.shape) for instruction in all_gathers for array in instruction.arrays), default=0)


def main():
    config = base.get_config()
    config.model.size = "tiny(num_layers=2, dim=1024, hidden=2816, num_heads=8, num_kv_heads=8, head_dim=128)"
    config.model.precision, config.model.ffn = "bfloat16", (sys.argv[4:] or ["swiglu"])[0]
    alone = sys.argv[3] == "data=1"
    mesh = sharding.make_mesh(sys.argv[3], list(ahead.devices())[: 1 if alone else None])
    with kernel_choice.compiling_for(ahead.TARGET), kernel_choice.recording_kernels() as used:
        lm = from_config.from_config(config.model, VOCABULARY).clone(scan=False)
        boxed = model.abstract_params(lm)
        shapes = nn.unbox(boxed)
        rounded = jax.eval_shape(lambda params: apply.quantize(params, sys.argv[2]), shapes)
        params = sharding.abstract_shards(box_as(boxed, rounded), mesh)
        with jax.set_mesh(mesh):
            compiled = programs(lm, params, mesh.shape["data"])
    leaves = jax.tree.leaves(rounded["group_0"], is_leaf=lambda leaf: isinstance(leaf, Weight))
    shapes = [kernel.shape for kernel in leaves if isinstance(kernel, Weight)]
    whole = {math.prod(shape) for shape in shapes} | {math.prod(shape[-2:]) for shape in shapes}  # an expert's, too
    sizes = whole | {size // mesh.shape["tensor"] for size in whole}
    print(
        json.dumps(
            {
                "used": {operation: sorted(kinds) for operation, kinds in used.items()},
                "floats": {name: floats(program, sizes) for name, program in compiled.items()},
                "side_by_side": floats(compiled["prefill"], {2 * max(whole)}),
                "gathered": {name: gathered(program) for name, program in compiled.items()},
                "temporaries": {
                    name: program.memory_analysis().temp_size_in_bytes for name, program in compiled.items()
                },
            }
        )
    )


if __name__ == "__main__":
    main()
