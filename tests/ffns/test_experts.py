"""Experts of every activation, with biases: values and gradients, dispatch, grouped kernels, meshes, FLOPs."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import contract
from contract import meshes
from efficientllm import model, sharding
from efficientllm.cost import formulas
from efficientllm.errors import UserError
from efficientllm.ffns.dense import ACTIVATIONS
from efficientllm.ops.grouped_matmul import vectors_of_rows
from efficientllm.quant.apply import quantize
from efficientllm.registry import build
from tiers import slow_except

B, T, D, E, F, k = 8, 6, 20, 8, 36, 2
X = np.random.default_rng(0).standard_normal((B, T, D), np.float32)
DROPLESS = {"kernel": "blocked"}
RAGGED = {"kernel": "ragged_dot"}
ROOMY = {"dispatch": "capacity", "capacity_factor": E / k}  # nothing is dropped
TIGHT = {"dispatch": "capacity", "capacity_factor": 0.7}
SHARED = {"shared_hidden": 12, "shared_gate": True}


def layer(precision="float32", **values):
    fields = {"num_experts": E, "top_k": k, "hidden": F, "use_bias": True} | values
    spec = f"moe({', '.join(f'{key}={value!r}' for key, value in fields.items())})"
    return build("ffn", spec, {"precision": precision})


@functools.cache
def boxed(moe):
    """Parameters boxed with their axes; biases are not zero and the router is far from blind."""
    noise = np.random.default_rng(1)

    def jitter(leaf):
        return leaf.replace_boxed(leaf.value + 0.3 * noise.standard_normal(leaf.value.shape, np.float32))

    params = jax.jit(moe.init)(jax.random.key(0), X)["params"]
    return jax.tree.map(jitter, params, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


def run(moe, params, x=X):
    return jax.jit(lambda params, x: moe.apply({"params": params}, x)[0])(params, x)


def by_definition(moe, params, x):
    """Every expert for every token, times the router's weight of it or zero."""
    function, is_gated = ACTIVATIONS[moe.activation]

    def linear(layer, x):
        return x @ layer["kernel"] + layer.get("bias", 0)

    def network(layers, x):
        up = linear(layers["up"], x)
        return linear(layers["down"], function(linear(layers["gate"], x)) * up if is_gated else function(up))

    probabilities = jax.nn.softmax(x @ params["router"]["kernel"], -1)
    best, chosen = jax.lax.top_k(probabilities, k)
    best = best / jnp.sum(best, -1, keepdims=True)
    y = sum(
        jnp.sum(jnp.where(chosen == e, best, 0.0), -1)[..., None]
        * network(jax.tree.map(lambda leaf, e=e: leaf[e], params["experts"]), x)
        for e in range(E)
    )
    if moe.shared_hidden:
        y += network(params["shared"], x) * jax.nn.sigmoid(x @ params["shared_gate"]["kernel"])
    return y


def value_and_gradients(apply, params):
    return jax.jit(jax.value_and_grad(lambda params, x: jnp.sum(jnp.sin(apply(params, x))), (0, 1)))(params, X)


CASES = [({"activation": name} | fields) for name in ACTIVATIONS for fields in (DROPLESS, RAGGED, ROOMY | SHARED)]
DEFAULT = [{"activation": "gelu_tanh"} | fields for fields in (DROPLESS, RAGGED, ROOMY | SHARED)]
DEFAULT.append({"activation": "swiglu"} | DROPLESS)


@pytest.mark.parametrize("fields", slow_except(CASES, *DEFAULT), ids=str)
def test_values_and_gradients_are_those_of_the_definition(fields):
    moe = layer(load_balance=0.0, z_loss=0.0, **fields)
    params = nn.unbox(boxed(moe))
    names = {"up", "down", "gate"} if ACTIVATIONS[moe.activation].is_gated else {"up", "down"}
    assert set(params["experts"]) == names and all(
        set(pair) == {"kernel", "bias"} for pair in params["experts"].values()
    )
    ours = value_and_gradients(lambda params, x: moe.apply({"params": params}, x)[0], params)
    theirs = value_and_gradients(functools.partial(by_definition, moe), params)
    assert all(jnp.any(leaf) for leaf in jax.tree.leaves(theirs[1][0]["experts"]))
    jax.tree.map(assert_close, ours, theirs)


def assert_close(ours, theirs):
    """Sums of hundreds of terms in another order: 1e-5 of the largest number."""
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


def test_dropped_assignments_add_no_bias():
    """With one expert that has no room, tokens beyond the capacity get zero."""
    moe = layer(num_experts=1, top_k=1, dispatch="capacity", capacity_factor=0.5, activation="gelu_tanh")
    params = nn.unbox(boxed(moe))
    y = run(moe, params)
    assert np.all(np.any(y[:, :3], -1)) and not np.any(y[:, 3:])


def test_biases_are_zero_at_first_and_experts_without_them_are_as_they_were():
    moe = layer(activation="gelu_tanh")
    params = nn.unbox(jax.jit(moe.init)(jax.random.key(0), X)["params"])
    assert not any(np.any(pair["bias"]) for pair in params["experts"].values())
    bare = layer(activation="gelu_tanh", use_bias=False)
    without = jax.tree.map(jnp.shape, nn.unbox(jax.eval_shape(bare.init, jax.random.key(0), X)["params"]))
    assert without["experts"] == {"up": {"kernel": (E, D, F)}, "down": {"kernel": (E, F, D)}}
    kernels_alone = params | {"experts": {name: {"kernel": pair["kernel"]} for name, pair in params["experts"].items()}}
    np.testing.assert_array_equal(run(moe, params), run(bare, kernels_alone))


@pytest.mark.parametrize("sizes", [[3, 0, 4, 1], None])
def test_vectors_of_rows(sizes):
    vectors, rows = np.random.default_rng(0).standard_normal((4, 3), np.float32), 8
    groups = np.repeat(np.arange(4), sizes or 2)

    def spread(v):
        return vectors_of_rows(v, None if sizes is None else jnp.array(sizes), rows)

    np.testing.assert_array_equal(jax.jit(spread)(vectors), vectors[groups])
    cotangent = np.random.default_rng(1).standard_normal((rows, 3), np.float32)
    expected = np.zeros((4, 3), np.float32)
    np.add.at(expected, groups, cotangent)
    np.testing.assert_allclose(jax.vjp(spread, vectors)[1](cotangent)[0], expected, rtol=1e-6, atol=1e-6)


MESHES = [
    ("data=2, fsdp=2, tensor=2", DROPLESS | SHARED),
    ("fsdp=2, expert=2, tensor=2", TIGHT),
    ("fsdp=8", DROPLESS),
    ("expert=8", TIGHT),
    ("fsdp=2, sequence=4", DROPLESS),
]


def step(moe):
    def loss(params, x):
        y, aux = moe.apply({"params": params}, x)
        return jnp.sum(jnp.sin(y)) + sum(aux["losses"].values()), aux

    return jax.value_and_grad(loss, (0, 1), has_aux=True)


@pytest.mark.slow
@pytest.mark.parametrize("mesh_spec, fields", slow_except(MESHES, *MESHES[:2]), ids=str)
def test_eight_devices_are_one(mesh_spec, fields):
    moe = layer(activation="gelu_tanh", **fields)
    params, mesh = boxed(moe), sharding.make_mesh(mesh_spec)
    alone = jax.jit(step(moe))(nn.unbox(params), X)
    with jax.set_mesh(mesh):
        where = sharding.shardings(params, mesh)
        rows = sharding.batch_sharding(mesh) if T % mesh.shape["sequence"] == 0 else sharding.replicated(mesh)
        run = jax.jit(step(moe), in_shardings=(where, rows), out_shardings=(None, (where, rows)))
        eight = run(*jax.device_put((nn.unbox(params), X), (where, rows)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), alone, jax.device_get(eight))


def test_a_quantized_kernel_that_tensor_cannot_shard_keeps_its_bias_once():
    """The hidden vectors are all-gathered then, and every device has the whole sum."""
    moe = layer(activation="gelu_tanh")
    params = quantize(nn.unbox(boxed(moe)), "float32", [("experts/down", "int4(group=32)")])
    assert not params["experts"]["down"]["kernel"].can_shard_inputs(2)
    alone = run(moe, params)
    with jax.set_mesh(sharding.make_mesh("data=4, tensor=2")):
        eight = run(moe, params)
    # int4's product on one CPU rounds activations to 16 bits; a bias missed or added twice moves outputs by 0.3.
    np.testing.assert_allclose(alone, eight, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("precision", ["mixed", "bfloat16"])
def test_biases_follow_the_activations_type(precision):
    exact, rounded = (layer(policy, activation="gelu_tanh") for policy in ("float32", precision))
    params = nn.unbox(boxed(exact))
    x = jnp.asarray(X, jnp.bfloat16 if precision == "bfloat16" else jnp.float32)
    y, expected = run(rounded, params, x), run(exact, params, x.astype(jnp.float32))
    assert y.dtype == x.dtype and jnp.linalg.norm(y - expected) < 0.02 * jnp.linalg.norm(expected)


SPEC = "moe(num_experts=8, top_k=2, hidden=32, activation='gelu_tanh', use_bias=True)"


def test_counts_are_those_of_the_formula():
    lm = contract.build("ffn", SPEC)
    boxed = model.abstract_params(lm)
    of_experts = sum(np.prod(shape) for path, shape, _ in formulas.leaves(boxed) if "/experts/" in path)
    assert of_experts == lm.num_layers * 8 * (2 * lm.dim * 32 + 32 + lm.dim)
    counts = formulas.count_parameters(lm, boxed)
    assert counts["total"] - counts["active"] == of_experts * 6 / 8


CHECKS = {
    check.__name__: check
    for check in (
        contract.check_flops,
        contract.check_decode,
        contract.check_gradients,
        contract.check_compressed,
        contract.check_leaves,
        contract.check_scan,
        meshes.check_sharded,
    )
}


@pytest.mark.slow
@pytest.mark.parametrize("check", slow_except(list(CHECKS), "check_flops", "check_leaves"))
def test_contract_with_biases(check):
    CHECKS[check]("ffn", SPEC)


@pytest.mark.parametrize("fields", [{}, {"dispatch": "capacity"}])
def test_memory_without_a_gate_is_what_the_formula_says(fields):
    moe = layer(hidden=128, load_balance=0.0, activation="gelu_tanh", **fields)
    x = jax.ShapeDtypeStruct((4, 128, 64), jnp.float32)
    params = jax.eval_shape(lambda x: nn.unbox(moe.init(jax.random.key(0), x)["params"]), x)
    run = jax.jit(jax.grad(lambda p, x: jnp.sum(moe.apply({"params": p}, x)[0] ** 2), (0, 1)))
    temporary = run.lower(params, x).compile().memory_analysis().temp_size_in_bytes
    assert 1 / 1.3 < temporary / moe.temporary_bytes(4, 128, 64) < 1.3


def test_an_unknown_activation_is_refused():
    with pytest.raises(UserError, match="activation = 'gelu' is none of swiglu, gelu_erf, gelu_tanh"):
        layer(activation="gelu")
