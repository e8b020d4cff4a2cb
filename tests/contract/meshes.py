"""Contract checks on meshes of several devices."""

import functools

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import contract
from contract import reasons
from efficientllm import model, sharding


def assert_sharded(kind, spec, mesh_spec):
    """Asserts that one device and eight give the same loss and gradients."""
    lm = contract.build(kind, spec)
    params = contract.parameters(lm)
    loss, grads = contract.unsharded(lm)
    mesh = sharding.make_mesh(mesh_spec)
    with jax.set_mesh(mesh):
        where = sharding.shardings(model.abstract_params(lm), mesh)
        run = jax.jit(
            functools.partial(contract.loss_and_gradients, lm), in_shardings=(where,), out_shardings=(None, where)
        )
        sharded_loss, sharded_grads = run(jax.device_put(params, where))
    why = reasons.of("sharding", kind, spec, mesh_spec)
    assert any(leaf != NamedSharding(mesh, P()) for leaf in jax.tree.leaves(where)) or "data" in mesh_spec, why
    np.testing.assert_allclose(loss, sharded_loss, rtol=1e-5, err_msg=why)
    contract.close(grads, jax.device_get(sharded_grads), 2e-5, why)


@contract.check(*contract.LAYERS, "position", quick=contract.TYPICAL)
def check_sharded(kind, spec):
    """A mesh of three axes gives the loss and gradients of one device. test_sharding.py has one axis at a time."""
    assert_sharded(kind, spec, "data=2, fsdp=2, tensor=2")


@contract.check(*contract.LAYERS, "position", quick=("gqa",))
def check_sharded_rows(kind, spec):
    """Sequence parallelism gives the loss and gradients of one device."""
    assert_sharded(kind, spec, "fsdp=2, sequence=4")


@contract.check(*contract.LAYERS, "position", quick=())
def check_sharded_again(kind, spec):
    """A mesh of other axis sizes gives the loss and gradients of one device."""
    assert_sharded(kind, spec, "data=1, fsdp=4, tensor=2")
