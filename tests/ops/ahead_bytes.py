"""Bytes that a training step moves on absent hardware, for its loss and in all: `python ahead_bytes.py gpu`."""

import json

import ahead
import flax.linen as nn
import jax
import jax.numpy as jnp

from configs import base
from efficientllm import sharding
from efficientllm.architecture import from_config
from efficientllm.plan import hlo_cost, hlo_text, operations
from efficientllm.runtime import kernel_choice
from efficientllm.train import step

ROWS, LENGTH, VOCABULARY, WIDTH = 4, 1024, 2**15, 256


def moved(**changes):
    """`{"all", "loss", "peak"}` of a step, in bytes: what it moves, what its loss moves, and its memory."""
    config = base.get_config()
    config.model.size = f"tiny(num_layers=4, dim={WIDTH}, num_heads=4, num_kv_heads=2, head_dim=64)"
    config.model.precision = "bfloat16"
    config.model.update(changes)
    lm = from_config.from_config(config.model, VOCABULARY)
    mesh = sharding.make_mesh("data=1", list(ahead.devices())[:1])
    with jax.set_mesh(mesh), kernel_choice.compiling_for(ahead.TARGET, (9, 0)):
        abstract = jax.eval_shape(step.init_state(lm, config.train, 0, LENGTH))
        jitted = step.jit_train_step(lm, config.train, mesh, sharding.shardings(abstract, mesh))
        dtypes = dict.fromkeys(("tokens", "targets", "segments", "positions"), jnp.int32) | {"weights": jnp.float32}
        batch = {name: jax.ShapeDtypeStruct((ROWS, LENGTH), dtype) for name, dtype in dtypes.items()}
        unboxed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), nn.unbox(abstract))
        compiled = jitted.lower(unboxed, batch).compile()
    program = hlo_text.Program(compiled.as_text())
    of_loss = (item for item in operations.of_program(program) if "loss" in (item.kind, item.label))
    return {
        "all": hlo_cost.moved_bytes(program),
        "loss": sum(item.times * item.bytes for item in of_loss),
        "peak": compiled.memory_analysis().temp_size_in_bytes,
    }


if __name__ == "__main__":
    cases = {"default": {}, "loop": {"unroll": 0}, "everything": {"unroll": 0, "remat": "everything_saveable"}}
    logits, head = ROWS * LENGTH * VOCABULARY, VOCABULARY * WIDTH
    report = {name: moved(**changes) for name, changes in cases.items()}
    print(json.dumps(report | {"logits": logits, "head": head}))
