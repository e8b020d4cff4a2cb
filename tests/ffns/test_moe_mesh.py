"""On a mesh each device sends its own tokens through the experts: same values, same gradients, no tokens gathered."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hlo
from efficientllm import sharding
from efficientllm.registry import build

T, D, F = 6, 20, 36
CUBE = "data=2, fsdp=2, tensor=2"
LAYERS = {
    "dropless": "num_experts=8, top_k=2, scores='sigmoid', bias_rate=0.001",
    "capacity": "num_experts=8, top_k=2, dispatch='capacity', capacity_factor=0.7",
    "odd experts": "num_experts=6, top_k=3, shared_hidden=12, shared_gate=True",
}


@functools.cache
def one_device(name, rows=8):
    """The layer, its parameters (boxed), its input, and its loss, statistics and gradients without a mesh."""
    moe = build("ffn", f"moe(hidden={F}, {LAYERS[name]})", {"precision": "float32"})
    x = np.random.default_rng(0).standard_normal((rows, T, D), np.float32)
    boxed = jax.jit(moe.init)(jax.random.key(0), x)["params"]
    boxed["router"]["kernel"] = boxed["router"]["kernel"].replace_boxed(boxed["router"]["kernel"].value * 50)
    params = nn.unbox(boxed)
    return moe, boxed, x, jax.jit(step(moe)).lower(params, x).compile()(params, x)


def step(moe):
    def loss(params, x):
        y, aux = moe.apply({"params": params}, x)
        return jnp.sum(jnp.sin(y)) + sum(aux["losses"].values()), aux

    return jax.value_and_grad(loss, (0, 1), has_aux=True)


def on_mesh(moe, boxed, x, mesh):
    where = sharding.shardings(boxed, mesh)
    rows = sharding.batch_sharding(mesh) if x.shape[0] % 8 == 0 else sharding.replicated(mesh)
    run = jax.jit(step(moe), in_shardings=(where, rows), out_shardings=(None, (where, rows)))
    return run.lower(nn.unbox(boxed), x).compile(), jax.device_put((nn.unbox(boxed), x), (where, rows))


# The contract suite and test_sharding run the mixture on every kind of mesh; here are the layouts that they have not.
CASES = [("dropless", "data=4, fsdp=2"), ("capacity", CUBE), ("odd experts", "data=1, fsdp=4, tensor=2")]


@pytest.mark.parametrize("name, mesh_spec", CASES)
def test_eight_devices_are_one(name, mesh_spec):
    moe, boxed, x, expected = one_device(name)
    mesh = sharding.make_mesh(mesh_spec)
    with jax.set_mesh(mesh):
        compiled, inputs = on_mesh(moe, boxed, x, mesh)
        found = compiled(*inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), expected, jax.device_get(found))
    tokens = {(8, T, size) for size in (D, 6, 8)} | {(8 * T, size) for size in (D, 6, 8)}
    gathered = [
        shape for found in hlo.instructions(compiled.as_text()) if found.op == "all-gather" for shape in found.shapes
    ]
    assert not tokens & set(gathered), "tokens or their logits are gathered over devices"


def test_rows_that_no_mesh_divides():
    moe, boxed, x, expected = one_device("dropless", rows=3)
    mesh = sharding.make_mesh(CUBE)
    with jax.set_mesh(mesh):
        compiled, inputs = on_mesh(moe, boxed, x, mesh)
        found = compiled(*inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), expected, jax.device_get(found))
