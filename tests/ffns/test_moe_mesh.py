"""On a mesh each device sends its own tokens through the experts: same values, same gradients, no tokens gathered."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hlo
from efficientllm import sharding
from efficientllm.errors import UserError
from efficientllm.ffns.dispatch import rows_per_expert
from efficientllm.plan import hlo_cost
from efficientllm.plan.hlo_text import Program
from efficientllm.registry import build
from tiers import slow_case

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


@pytest.mark.slow
@pytest.mark.parametrize("name, mesh_spec", CASES)
def test_eight_devices_are_one(name, mesh_spec):
    moe, boxed, x, expected = one_device(name)
    mesh = sharding.make_mesh(mesh_spec)
    with jax.set_mesh(mesh):
        compiled, inputs = on_mesh(moe, boxed, x, mesh)
        results = compiled(*inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), expected, jax.device_get(results))
    tokens = {(8, T, size) for size in (D, 6, 8)} | {(8 * T, size) for size in (D, 6, 8)}
    gathered = [
        shape
        for results in hlo.instructions(compiled.as_text())
        if results.op == "all-gather"
        for shape in results.shapes
    ]
    assert not tokens & set(gathered), "tokens or their logits are gathered over devices"


@pytest.mark.slow
def test_rows_that_no_mesh_divides():
    moe, boxed, x, expected = one_device("dropless", rows=3)
    mesh = sharding.make_mesh(CUBE)
    with jax.set_mesh(mesh):
        compiled, inputs = on_mesh(moe, boxed, x, mesh)
        results = compiled(*inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), expected, jax.device_get(results))


@pytest.mark.parametrize(
    "mesh_spec",
    ["fsdp=2, expert=4", slow_case("expert=8"), slow_case("expert=4, tensor=2")],
)
def test_tokens_travel_to_their_experts(mesh_spec):
    """Same values and gradients; every row there and back, forward and backward, its weight there and its gradient
    back; and no device meets the kernels of another's experts."""
    moe, boxed, x, expected = one_device("capacity")
    mesh = sharding.make_mesh(mesh_spec)
    with jax.set_mesh(mesh):
        compiled, inputs = on_mesh(moe, boxed, x, mesh)
        results = compiled(*inputs)
    assert expected[0][1]["stats"]["drop_rate"] > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), expected, jax.device_get(results))
    sent, others = travel(compiled, mesh)
    rows = 8 * (len(x) // sharding.count_row_shards(mesh)) * rows_per_expert(T, 8, 2, 0.7)
    assert sent == 4 * rows * (4 * D + 2)
    kernel_bytes = 4 * D * F * 8 // mesh.shape["expert"] // mesh.shape["tensor"]
    assert max(collective.bytes for collective in others) <= kernel_bytes, others


ROUNDS = {  # capacity_factor: rounds that it takes
    4.0: 1,
    1.25: None,  # as many as the router wants
    0.3: None,
}


@pytest.mark.parametrize("factor", ROUNDS)
@pytest.mark.parametrize("mesh_spec", ["fsdp=2, expert=4", slow_case("expert=8"), slow_case("expert=4, tensor=2")])
def test_tokens_travel_without_a_capacity(mesh_spec, factor):
    """Same values, statistics and gradients, in one round and in several; no device meets kernels of another's."""
    moe, boxed, x, expected = one_device("dropless")
    moe = moe.clone(capacity_factor=factor)
    mesh = sharding.make_mesh(mesh_spec)
    with jax.set_mesh(mesh):
        compiled, inputs = on_mesh(moe, boxed, x, mesh)
        results = jax.device_get(compiled(*inputs))
    rounds = results[0][1]["stats"].pop("rounds")
    assert rounds == 1 if ROUNDS[factor] else rounds > 1, rounds
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), expected, results)
    _, others = travel(compiled, mesh)
    kernel_bytes = 4 * D * F * 8 // mesh.shape["expert"] // mesh.shape["tensor"]
    assert max(collective.bytes for collective in others) <= kernel_bytes, others


def travel(compiled, mesh):
    """Bytes of a device's all-to-alls over `expert`, and the collectives of other kinds."""
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    alike = np.moveaxis(ids, mesh.axis_names.index("expert"), -1).reshape(-1, mesh.shape["expert"])
    groups = {tuple(sorted(group)) for group in alike.tolist()}
    collectives = hlo_cost.collectives(Program(compiled.as_text()), mesh.size)
    exchanges = [collective for collective in collectives if collective.kind == "all-to-all"]
    assert exchanges and all(
        {tuple(sorted(group)) for group in collective.groups} == groups for collective in exchanges
    ), exchanges
    return sum(collective.times * collective.bytes for collective in exchanges), [
        collective for collective in collectives if collective.kind != "all-to-all"
    ]


@pytest.mark.parametrize(
    "name, mesh_spec, message",
    [
        ("six", "fsdp=2, expert=4", "expert = 4 does not divide moe's num_experts = 6; 2 would"),
    ],
)
def test_what_the_axis_does_not_take_is_refused_by_name(name, mesh_spec, message):
    layers = LAYERS | {"six": "num_experts=6, top_k=2, dispatch='capacity'"}
    moe = build("ffn", f"moe(hidden={F}, {layers[name]})", {"precision": "float32"})
    with jax.set_mesh(sharding.make_mesh(mesh_spec)), pytest.raises(UserError, match=message):
        jax.eval_shape(moe.init, jax.random.key(0), jnp.zeros((8, T, D)))


def test_rows_that_the_axis_does_not_divide_travel_too():
    moe, boxed, x, expected = one_device("capacity", rows=3)
    mesh = sharding.make_mesh("fsdp=2, expert=4")
    with jax.set_mesh(mesh):
        compiled, inputs = on_mesh(moe, boxed, x, mesh)
        results = compiled(*inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), expected, jax.device_get(results))
