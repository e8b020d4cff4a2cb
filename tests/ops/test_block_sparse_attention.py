"""Attention over chosen blocks on several devices: the same numbers, and every device does its own rows alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import hlo
from efficientllm import sharding
from efficientllm.ops import block_sparse_attention

B, T, H, G, K, BLOCKS, SIZE = 8, 64, 4, 2, 8, 2, 8


def arrays():
    """Queries, keys, values, and blocks that no query stands before."""
    random = np.random.default_rng(0)
    q, k, v = (random.normal(size=(B, T, heads, K)).astype(np.float32) for heads in (H, G, G))
    newest = np.arange(T) // SIZE
    older = np.where(newest > 0, random.integers(0, np.maximum(newest, 1), (B, G, T)), -1)
    start = np.stack([np.broadcast_to(newest, (B, G, T)), older], -1) * SIZE
    index = np.broadcast_to(np.arange(T), (B, T))
    return q, k, v, np.moveaxis(start, 1, 2).astype(np.int32), index.astype(np.int32)


def loss(q, k, v, start, index, kernel):
    chosen = block_sparse_attention.SelectedBlocks(start, index, SIZE)
    return jnp.sum(jnp.sin(block_sparse_attention.attend_blocks(q, k, v, chosen, kernel)))


@pytest.mark.parametrize("mesh_spec", ["data=2, fsdp=4", "fsdp=4, tensor=2"])
def test_each_device_does_its_own_rows_and_choosers(mesh_spec):
    grad = jax.value_and_grad(functools.partial(loss, kernel="grouped"), (0, 1, 2))
    expected = jax.jit(jax.value_and_grad(functools.partial(loss, kernel="masked"), (0, 1, 2)))(*arrays())
    mesh = sharding.make_mesh(mesh_spec, jax.devices())
    names = [("batch", None, "kv_heads", None)] * 4 + [("batch", None)]
    specs = [sharding.spec(axes, x.shape, mesh) for axes, x in zip(names, arrays(), strict=True)]
    where = tuple(NamedSharding(mesh, spec) for spec in specs)
    with jax.set_mesh(mesh):
        args = jax.device_put(arrays(), where)
        compiled = jax.jit(grad, in_shardings=where).lower(*args).compile()
        results = compiled(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), results, expected)
    moved = {instruction.op for instruction in hlo.instructions(compiled.as_text())} & {"all-gather", "all-to-all"}
    assert not moved, moved
