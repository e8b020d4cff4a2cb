"""Quantized experts on a mesh: sharded, gathered and multiplied without dequantization."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficientllm import sharding
from efficientllm.adapters.lora import LoRA
from efficientllm.ops import native
from efficientllm.plan import hlo_text
from efficientllm.quant import apply
from efficientllm.registry import build
from efficientllm.runtime import kernel_choice
from efficientllm.weights import box_as
from tiers import slow_case

E, T, D, F = 16, 3, 64, 128
LAYERS = {"dropless": "", "capacity": ", dispatch='capacity', capacity_factor=2.0"}


@functools.cache
def layer(kind):
    """The layer, its parameters (boxed) and an input of 24 tokens."""
    moe = build("ffn", f"moe(num_experts={E}, top_k=2, hidden={F}{LAYERS[kind]})", {"precision": "float32"})
    x = np.random.default_rng(0).standard_normal((8, T, D), np.float32)
    return moe, jax.jit(moe.init)(jax.random.key(0), x)["params"], x


def step(moe, params, x):
    """The layer's output and the gradient of its input."""
    y, pull = jax.vjp(lambda x: moe.apply({"params": params}, x)[0], x)
    return y, pull(jnp.cos(y))[0]


def placed(boxed, params, x, mesh):
    """Parameters in the place of those of `boxed`, and the input, on the shards that their axes name."""
    boxed_params = box_as(boxed, params)
    return jax.device_put(
        (nn.unbox(boxed_params), x), (sharding.shardings(boxed_params, mesh), sharding.batch_sharding(mesh))
    )


def on_mesh(kind, form, mesh):
    """`(what one device finds, what the mesh does, its program)`."""
    moe, boxed, x = layer(kind)
    rounded = apply.quantize(nn.unbox(boxed), form)
    run = jax.jit(functools.partial(step, moe))
    alone, there = run(rounded, x), placed(boxed, rounded, x, mesh)
    with jax.set_mesh(mesh):
        program = run.lower(*there).compile()
        return alone, program(*there), program


def floats(program):
    """The elements of the largest float32 array in the program, and of the largest that is gathered."""
    large, gathered = 0, 0
    for instruction in hlo_text.Program(program.as_text()).instructions():
        largest = max((math.prod(array.shape) for array in instruction.arrays if array.dtype == "f32"), default=0)
        large = max(large, largest)
        gathered = max(gathered, largest if instruction.op.startswith("all-gather") else 0)
    return large, gathered


CASES = [
    ("dropless", "data=2, fsdp=2, tensor=2", "int4(symmetric=False)"),
    ("dropless", "tensor=8", "int4"),  # four groups, which eight devices cannot divide
]
MORE = [
    ("dropless", "fsdp=8", "int4"),
    ("dropless", "data=2, tensor=4", "nf4(block=32)"),
    ("dropless", "data=2, tensor=4", "nf4"),  # two groups
    ("dropless", "data=2, tensor=4", "int8"),
    ("dropless", "fsdp=4, tensor=2", "bfloat16"),  # which XLA gathers as float32 on CPUs
    ("capacity", "expert=4, tensor=2", "int4"),  # one product of all of a device's experts
    ("capacity", "expert=2, tensor=4", "nf4"),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind, mesh_spec, form", CASES + [slow_case(*case) for case in MORE])
def test_each_device_multiplies_its_part(kind, mesh_spec, form, monkeypatch):
    monkeypatch.setattr(native, "is_usable", lambda: False)
    alone, sharded, program = on_mesh(kind, form, sharding.make_mesh(mesh_spec))
    for a, b in zip(alone, sharded, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    large, gathered = floats(program)
    if kind == "dropless" and form != "bfloat16":  # never more floats than one expert's kernel has; tokens have fewer
        assert large <= D * F and gathered < D * F


@pytest.mark.skipif(not native.instruction_sets(), reason="no native products were built")
@pytest.mark.parametrize("mesh_spec", ["data=2, tensor=4", slow_case("fsdp=4, tensor=2")])
def test_native_products_are_each_devices_own(mesh_spec):
    with kernel_choice.recording_kernels() as used:
        alone, sharded, _ = on_mesh("dropless", "int4", sharding.make_mesh(mesh_spec))
    assert used["matmul_int4"] == {"ffi"}
    for a, b in zip(alone, sharded, strict=True):
        assert np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(a)  # activations of 16 bits of a group's largest


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh_spec, form", [("data=2, fsdp=2, tensor=2", "int4"), ("tensor=8", "int4"), ("fsdp=8", "nf4")]
)
def test_adapters_around_them_learn_what_they_learn_on_one_device(mesh_spec, form):
    moe, boxed, x = layer("dropless")
    params = apply.quantize(nn.unbox(boxed), form)
    draw = np.random.default_rng(1)
    weights = draw.standard_normal(x.shape, np.float32)
    for expert in params["experts"].values():
        E, K, N = expert["kernel"].shape
        a, b = draw.standard_normal((E, K, 4), np.float32), draw.standard_normal((E, 4, N), np.float32)
        expert["kernel"] = LoRA(expert["kernel"], 0.1 * a, 0.1 * b)

    def gradients(params, x):
        """Of `a` and `b` of each kernel."""

        def loss(factors):
            experts = {name: {"kernel": around[name].replace(**both)} for name, both in factors.items()}
            return jnp.vdot(moe.apply({"params": params | {"experts": experts}}, x)[0], weights)

        around = {name: expert["kernel"] for name, expert in params["experts"].items()}
        return jax.grad(loss)({name: {"a": leaf.a, "b": leaf.b} for name, leaf in around.items()})

    alone = jax.jit(gradients)(params, x)
    mesh = sharding.make_mesh(mesh_spec)
    with jax.set_mesh(mesh):
        there = placed(boxed, params, x, mesh)
        program = jax.jit(gradients).lower(*there).compile()
        sharded = program(*there)
    for a, b in zip(*map(jax.tree.leaves, jax.device_get((alone, sharded))), strict=True):
        assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(a)
    assert floats(program)[0] <= D * F
