"""Modulations: what each does to a branch, its parameters, and the one that needs a conditioning vector."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from efficientllm import registry, sharding
from efficientllm.errors import UserError
from efficientllm.modulations.base import Affine

pytestmark = pytest.mark.quick
B, T, D = 8, 3, 16
NAMES = ("plain", "linear", "table", "layerscale")
NOISE = np.random.default_rng(0).standard_normal((4, B, T, D), np.float32)
CONDITION = NOISE[0, :, 0]


class Branches(nn.Module):
    """Both branches of a block, with the identity as mixer and ffn and without norms; returns `[B, T, D]`."""

    modulation: str

    @nn.compact
    def __call__(self, x_BTD, condition_BD):
        modulation = registry.build("modulation", self.modulation, {"precision": "float32"}, name="modulation")
        shared = registry.build("modulation", self.modulation, {"precision": "float32"}, name="shared")
        if condition_BD is not None:
            condition_BD = shared.project(condition_BD)
        for affine in modulation(types.SimpleNamespace(condition_BD=condition_BD), D):
            x_BTD = affine.add(x_BTD, affine.modulate(x_BTD))
        return x_BTD


def parameters(module, jitter=0.3):
    params = nn.unbox(module.init(jax.random.key(0), NOISE[1], CONDITION).get("params", {}))
    noise = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + jitter * noise.standard_normal(leaf.shape, np.float32), params)


def affine(x, shift, scale, gate):
    return x + gate[:, None] * (x * (1 + scale[:, None]) + shift[:, None])


def silu(x):
    return x / (1 + np.exp(-x))


def test_plain_is_the_block_as_it_is():
    module, x_BTD = Branches("plain"), jnp.asarray(NOISE[1])
    assert parameters(module) == {}
    traced = jax.make_jaxpr(lambda x: module.apply({}, x, None))(x_BTD)
    assert [equation.primitive.name for equation in traced.eqns] == ["add", "add"]
    np.testing.assert_array_equal(module.apply({}, x_BTD, None), 4 * x_BTD)


def test_linear_is_a_projection_of_the_silu_in_the_order_shift_scale_gate():
    module = Branches("linear")
    params = parameters(module)
    assert jax.tree.map(jnp.shape, params) == {"modulation": {"kernel": (D, 6 * D), "bias": (6 * D,)}}
    kernel, bias = (np.asarray(params["modulation"][name], np.float64) for name in ("kernel", "bias"))
    chunks = np.split(silu(CONDITION) @ kernel + bias, 6, -1)
    expected = affine(affine(NOISE[1], *chunks[:3]), *chunks[3:])
    np.testing.assert_allclose(module.apply({"params": params}, NOISE[1], CONDITION), expected, rtol=2e-5, atol=2e-5)


def test_table_adds_a_block_s_rows_to_the_shared_projection():
    module = Branches("table")
    params = parameters(module)
    shapes = {"modulation": {"table": (6, D)}, "shared": {"kernel": (D, 6 * D), "bias": (6 * D,)}}
    assert jax.tree.map(jnp.shape, params) == shapes
    kernel, bias = (np.asarray(params["shared"][name], np.float64) for name in ("kernel", "bias"))
    projected = (silu(CONDITION) @ kernel + bias).reshape(B, 6, D) + np.asarray(params["modulation"]["table"])
    chunks = projected.swapaxes(0, 1)
    expected = affine(affine(NOISE[1], *chunks[:3]), *chunks[3:])
    np.testing.assert_allclose(module.apply({"params": params}, NOISE[1], CONDITION), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name, parameters", [("linear", ("kernel", "bias")), ("table", ("table",))])
def test_a_branch_that_is_not_conditioned_has_no_vectors(name, parameters):
    """Wan's block of self-attention has the first three vectors, and that of cross-attention and an ffn the others."""
    module = registry.build("modulation", f"{name}(precision='float32')")
    ctx = types.SimpleNamespace(condition_BD=jnp.asarray(np.tile(CONDITION, 6) if name == "table" else CONDITION))
    whole = nn.unbox(module.init(jax.random.key(0), ctx, D))["params"]
    whole = jax.tree.map(lambda leaf: NOISE.ravel()[: leaf.size].reshape(leaf.shape), whole)
    both = module.apply({"params": whole}, ctx, D)
    for i, branches in enumerate([(True, False), (False, True)]):
        axis = 0 if name == "table" else -1
        half = jax.tree.map(lambda leaf, i=i, axis=axis: np.split(leaf, 2, axis)[i], whole)
        assert half.keys() == set(parameters)
        affines = module.apply({"params": half}, ctx, D, branches)
        np.testing.assert_allclose(affines[i], both[i], rtol=1e-6, atol=1e-6)
        assert affines[1 - i] == Affine()
    assert module.apply({}, ctx, D, (False, False)) == (Affine(), Affine())


def test_the_end_of_a_model_with_tables_adds_a_table_to_the_vector_itself():
    module = registry.build("modulation", "table(precision='float32')")
    end = module.apply({"params": {"table": NOISE[1, 0, :2]}}, CONDITION, "float32", method="final")
    np.testing.assert_array_equal(end.shift[:, 0], NOISE[1, 0, 0] + CONDITION)
    np.testing.assert_array_equal(end.scale[:, 0], NOISE[1, 0, 1] + CONDITION)
    assert end.gate is None


def test_layerscale_is_a_gate_of_each_branch():
    module = Branches("layerscale(initial=0.25)")
    params = parameters(module, jitter=0.0)
    np.testing.assert_array_equal(params["modulation"]["mixer_gate"], np.full(D, 0.25, np.float32))
    params = {"modulation": {"mixer_gate": NOISE[2, 0, 0], "ffn_gate": NOISE[2, 0, 1]}}
    expected = NOISE[1] * (1 + NOISE[2, 0, 0]) * (1 + NOISE[2, 0, 1])
    np.testing.assert_allclose(module.apply({"params": params}, NOISE[1], None), expected, rtol=1e-6, atol=1e-6)


def test_adaln_zero_is_the_identity_at_first():
    module = Branches("linear")
    params = parameters(module, jitter=0.0)
    np.testing.assert_array_equal(module.apply({"params": params}, NOISE[1], CONDITION), NOISE[1])


def test_a_table_starts_at_the_scale_of_its_width():
    module = registry.build("modulation", "table(precision='float32')")
    ctx = types.SimpleNamespace(condition_BD=jnp.zeros((1, 6 * 1024)))
    table = nn.unbox(jax.jit(lambda key: module.init(key, ctx, 1024))(jax.random.key(0)))["params"]["table"]
    assert abs(float(jnp.std(table)) * 1024**0.5 - 1) < 4 / (2 * table.size) ** 0.5


@pytest.mark.parametrize("name", ["linear", "table"])
def test_a_model_without_a_conditioning_vector_is_refused(name):
    module = registry.build("modulation", f"{name}(precision='float32')")
    with pytest.raises(UserError, match="^modulation: needs a conditioning vector"):
        module.init(jax.random.key(0), types.SimpleNamespace(condition_BD=None), D)


def test_what_a_branch_adds_has_the_type_of_the_residual_stream():
    x_BTD = jnp.asarray(NOISE[1], jnp.bfloat16)
    vectors = Affine(*(jnp.asarray(NOISE[i, :, :1]) for i in range(3)))
    assert vectors.modulate(x_BTD).dtype == vectors.add(x_BTD, x_BTD).dtype == jnp.bfloat16
    exact = x_BTD.astype(jnp.float32) * (1 + NOISE[1, :, :1]) + NOISE[0, :, :1]  # one rounding, at the end
    np.testing.assert_array_equal(vectors.modulate(x_BTD), exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter(name):
    module = Branches(name)

    def loss(params):
        return jnp.sum(module.apply({"params": params}, NOISE[1], CONDITION) ** 2)

    grads = jax.grad(loss)(parameters(module))
    assert all(jnp.all(jnp.isfinite(leaf)) and jnp.any(leaf) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", ["linear", "table"])
@pytest.mark.parametrize("mesh_spec", ["data=2, fsdp=2, tensor=2", "fsdp=8"])
def test_eight_devices_give_what_one_gives(name, mesh_spec):
    module = Branches(name)
    params = parameters(module)

    def loss(params, x, c):
        return jnp.sum(module.apply({"params": params}, x, c) ** 2)

    alone = jax.value_and_grad(loss)(params, NOISE[1], CONDITION)
    mesh = sharding.make_mesh(mesh_spec)
    boxed = jax.eval_shape(module.init, jax.random.key(0), NOISE[1], CONDITION)["params"]
    where = sharding.shardings(boxed, mesh)
    assert any(leaf.spec != P() for leaf in jax.tree.leaves(where))
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P(sharding.BATCH))
        arrays = jax.device_put(NOISE[1], rows), jax.device_put(CONDITION, rows)
        eight = jax.jit(jax.value_and_grad(loss), out_shardings=(None, where))(jax.device_put(params, where), *arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-3), alone, jax.device_get(eight))
