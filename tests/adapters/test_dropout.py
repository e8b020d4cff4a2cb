"""Dropout of adapter inputs, around kernels and experts, in training only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import contract
from adapters.test_methods import DROPPING, MOE, logits, tuned
from configs import base
from efficientllm import sharding
from efficientllm.adapters.dora import DoRA
from efficientllm.adapters.lora import LoRA, dropped
from efficientllm.ops.grouped_matmul import grouped_matmul
from efficientllm.train import step
from efficientllm.weights import matmul

E, A, K, N, R, RATE, SCALE = 3, 12, 10, 6, 2, 0.5, 1.5
SIZES = {"ragged": (5, 0, 7), "equal": None}


def leaf(kind, stack):
    def draw(*shape):
        return np.random.default_rng(len(shape)).standard_normal((*stack, *shape), np.float32)

    keys = jax.random.key_data(jax.random.split(jax.random.key(0), stack))
    m = {"m": draw(N)} if kind is DoRA else {}
    a, b = draw(K, R), np.roll(draw(R, N), 1)
    return kind(base=draw(K, N), a=a, b=b, key=keys, scale=SCALE, dropout=RATE, **m)


def expected(leaf, x, group):
    """Row by row, as peft writes it: what the frozen kernel multiplies is whole."""
    key = jax.random.wrap_key_data(leaf.key.reshape(-1, 2)[0])
    low = np.where(jax.random.bernoulli(key, 1 - RATE, x.shape), x / (1 - RATE), 0)
    rows = []
    for i, e in enumerate(group):
        base, a, b = (np.asarray(array)[e] for array in (leaf.base, leaf.a, leaf.b))
        gain = np.ones(N)
        if isinstance(leaf, DoRA):
            gain = leaf.m[e] / np.linalg.norm(base + SCALE * a @ b, axis=0)
        rows.append(x[i] @ base + (gain - 1) * (low[i] @ base) + gain * SCALE * (low[i] @ a @ b))
    return np.stack(rows)


@pytest.mark.parametrize("kind", [LoRA, DoRA])
@pytest.mark.parametrize("kernel", ["blocked", "ragged_dot"])
@pytest.mark.parametrize("sizes", SIZES)
def test_experts_adapters_drop_their_inputs(kind, kernel, sizes):
    x, sizes = np.random.default_rng(9).standard_normal((A, K), np.float32), SIZES[sizes]
    group = np.repeat(np.arange(E), (A // E,) * E if sizes is None else sizes)
    adapter = leaf(kind, (E,))
    product = grouped_matmul(x, adapter, None if sizes is None else jnp.array(sizes), "float32", kernel)
    np.testing.assert_allclose(product, expected(adapter, x, group), atol=2e-5)


@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_a_kernels_adapter_drops_its_input(kind):
    x = np.random.default_rng(9).standard_normal((A, K), np.float32)
    adapter = leaf(kind, ())
    np.testing.assert_allclose(matmul(x, adapter, "float32"), expected(adapter, x, [()] * A), atol=2e-5)


def test_every_device_drops_its_own():
    """Where each sees its own rows under one key: alike, they would drop the same places of all rows."""
    mesh, rows = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec
    key = jax.random.key_data(jax.random.key(0))
    with jax.set_mesh(mesh):
        drop = jax.shard_map(lambda x: dropped(x, key, RATE), in_specs=rows("data"), out_specs=rows("data"))
        inputs = np.asarray(jax.jit(drop)(jnp.ones((8, 64))))
    assert set(np.unique(inputs)) == {0, 2} and len(np.unique(inputs, axis=0)) == 8
    assert 0.4 < (inputs == 0).mean() < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("spec", DROPPING)
@pytest.mark.parametrize("technique", [("mixer", "gqa"), ("ffn", MOE)])
def test_dropout_drops_in_training_only(spec, technique):
    method, lm, _, state = tuned(spec, *technique)
    whole = logits(lm, state.all_params)
    np.testing.assert_allclose(whole, logits(lm, tuned(method_without(spec), *technique)[3].all_params), atol=1e-6)
    grads = [
        jax.jit(lambda k: step.gradients(lm, state.params, contract.batch(), 2, state.frozen, k)[0])(jax.random.key(k))
        for k in (0, 0, 1)
    ]
    flat = [np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in grads]
    assert np.array_equal(flat[0], flat[1]) and not np.allclose(flat[0], flat[2])


@pytest.mark.slow
@pytest.mark.parametrize("spec", DROPPING)
def test_experts_over_devices_drop(spec):
    """Twice the same under one key, and what is dropped is not what is dropped under another."""
    method, lm, _, state = tuned(spec, "ffn", MOE)
    mesh = sharding.make_mesh("data=2, fsdp=2, tensor=2")

    def run(s, key):
        return step.gradients(lm, s.params, contract.batch(), 1, s.frozen, key)[0]

    with jax.set_mesh(mesh):
        where = sharding.shardings(
            jax.eval_shape(step.init_state(lm, base.get_config().train, 0, contract.T, method)), mesh
        )
        many, placed = jax.jit(run, in_shardings=(where, None)), jax.device_put(state, where)
        products = [jax.device_get(many(placed, jax.random.key(seed))) for seed in (0, 0, 1)]
    flat = [np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in products]
    assert np.isfinite(flat[0]).all() and np.array_equal(flat[0], flat[1]) and not np.allclose(flat[0], flat[2])


def method_without(spec):
    return spec.replace(", dropout=0.5", "")
