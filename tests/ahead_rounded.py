"""Compiles prefill and decoding with rounded weights for a device that is not here: `ahead_rounded.py tpu|gpu FORM`.

Prints what products run on, and each program's arrays of floats with as many elements as some rounded kernel has.
"""

import json
import math
import sys

import ahead  # ahead of JAX: it names the platform
import flax.linen as nn
import jax
from jax.sharding import SingleDeviceSharding

from configs import base
from efficientllm import architecture, kernels, model
from efficientllm.infer.engine import Engine
from efficientllm.infer.samplers import Greedy
from efficientllm.plan import hlo
from efficientllm.quant import tree

LENGTH, PROMPT, VOCABULARY = 128, 64, 640  # no table has the size of a kernel


def programs(lm, params):
    engine = Engine(lm, params, Greedy(), -1, LENGTH)
    prefill, _ = engine.trace_prefill(1, PROMPT)
    return {"prefill": prefill.lower().compile(), "decode": engine.trace_decode(1).lower().compile()}


def floats(program, sizes):
    """Arrays of floats of one of `sizes`, within fusions too, as `dtype[shape]`."""
    arrays = [array for each in hlo.Program(program.as_text()).instructions() for array in each.arrays]
    large = {(x.dtype, x.shape) for x in arrays if "f" in x.dtype and math.prod(x.shape) in sizes}
    return sorted(f"{dtype}{list(shape)}" for dtype, shape in large)


def main():
    config = base.get_config()
    config.model.size = "tiny(num_layers=2, dim=1024, hidden=2816, num_heads=8, num_kv_heads=4, head_dim=128)"
    config.model.precision = "bfloat16"
    where = SingleDeviceSharding(next(iter(ahead.devices())))
    with kernels.compiling_for(ahead.TARGET), kernels.recording() as used:
        lm = architecture.from_config(config.model, VOCABULARY).clone(scan=False)
        shapes = nn.unbox(model.abstract_params(lm))
        params = jax.eval_shape(lambda params: tree.quantize(params, sys.argv[2]), shapes)
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), params)
        found = programs(lm, params)
    sizes = {math.prod(kernel.shape) for kernel in jax.tree.leaves(shapes["group_0"]) if kernel.ndim > 1}
    print(
        json.dumps(
            {
                "used": {operation: sorted(kinds) for operation, kinds in used.items()},
                "floats": {name: floats(program, sizes) for name, program in found.items()},
                "temporaries": {name: program.memory_analysis().temp_size_in_bytes for name, program in found.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
