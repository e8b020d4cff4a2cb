"""Every shape of a mesh of eight devices gives the losses of one, for every family of models, and a checkpoint of one
mesh goes on on another."""

import functools
import itertools

import flax.linen as nn
import jax
import numpy as np
import pytest

import contract
from configs import base
from efficientllm import sharding
from efficientllm.architecture import from_config
from efficientllm.train import step
from efficientllm.train.checkpoint import Checkpoints

B, T, STEPS = 8, 24, 5
SIZE = "tiny(num_layers=2, dim=32, num_heads=8, num_kv_heads=4, head_dim=8, hidden=48)"
EXPERTS = "moe(num_experts=8, top_k=2, hidden=40, load_balance=0.01, z_loss=0.001"
FAMILIES = {
    "dense": {},
    "mla": {"mixer": "mla(kv_rank=16, q_rank=24, rope_dim=4)"},
    "nsa": {"mixer": "nsa(compress_block=4, compress_stride=2, select_block=4, select_count=4, window=5)"},
    "mamba": {"mixer": "mamba", "ffn": "none"},
    "moe": {"ffn": f"{EXPERTS})"},
    "capacity": {"ffn": f"{EXPERTS}, dispatch='capacity', capacity_factor=1.25)"},
}
pytestmark = pytest.mark.slow


def shapes():
    """Every mesh of eight devices."""
    for sizes in itertools.product((1, 2, 4, 8), repeat=len(sharding.AXES)):
        if np.prod(sizes) == 8:
            yield ", ".join(f"{axis}={size}" for axis, size in zip(sharding.AXES, sizes, strict=True) if size > 1)


def cases():
    """Experts with a capacity travel over an axis of their own; a dense model is split over it as over fsdp."""
    for family, mesh in itertools.product(FAMILIES, shapes()):
        if "expert" not in mesh or family in ("dense", "capacity"):
            yield pytest.param(family, mesh, marks=pytest.mark.xdist_group(f"meshes {family}"))


@functools.cache
def trained(family):
    config = base.get_config()
    config.model.unroll = 0
    config.model.size = SIZE
    config.model.update(FAMILIES[family])
    config.train.steps, config.train.schedule = STEPS, "constant(peak=0.01)"
    config.train.optimizer = "adamw(b1=0.9, b2=0.95, eps=1e-5)"  # as in test_sharding.py: none of rounding is a step
    return from_config.from_config(config.model, contract.VOCAB), config.train


def compiled(family, mesh):
    """(the training step on a mesh, the state that it starts from, on its shardings)."""
    lm, train = trained(family)
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(step.init_state(lm, train, 0, T))
        where = sharding.shardings(abstract, mesh)
        shaped = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), nn.unbox(abstract), where
        )
        return step.jit_train_step(lm, train, mesh, where).lower(shaped, batches(mesh)[0]).compile(), shaped


def batches(mesh):
    """Rows of two documents, whose later half weighs less."""
    packed = []
    for seed in range(STEPS):
        ids = np.random.default_rng(seed).integers(0, contract.VOCAB // 4, (B, T + 1), np.int32)
        batch = contract.batch() | {"tokens": ids[:, :-1], "targets": ids[:, 1:]}
        batch["weights"] = np.where(batch["segments"] == 1, 1.0, np.linspace(0.2, 1.0, B)[:, None]).astype(np.float32)
        packed.append(jax.device_put(batch, sharding.batch_sharding(mesh)))
    return packed


@functools.cache
def start(family):
    """The first state, on the host."""
    lm, train = trained(family)
    return jax.device_get(nn.unbox(jax.jit(step.init_state(lm, train, 0, T))()))


def run(family, mesh, state=None, steps=range(STEPS)):
    """(loss and gradient's norm of each step, the last state)."""
    train_step, shaped = compiled(family, mesh)
    if state is None:
        state = jax.device_put(start(family), jax.tree.map(lambda leaf: leaf.sharding, shaped))
    losses = []
    for index in steps:
        state, metrics = train_step(state, batches(mesh)[index])
        losses.append([float(metrics[key]) for key in ("loss", "total_loss", "grad_norm")])
    return np.array(losses), state


@functools.cache
def one_device(family):
    curve, _ = run(family, sharding.make_mesh("data=1", jax.devices()[:1]))
    assert abs(curve[-1, 0] - curve[0, 0]) > 0.05  # it trains
    return curve


@pytest.mark.parametrize("family, mesh_spec", list(cases()))
def test_every_mesh_gives_the_curve_of_one_device(family, mesh_spec):
    np.testing.assert_allclose(run(family, sharding.make_mesh(mesh_spec))[0], one_device(family), rtol=1e-5)


@pytest.mark.parametrize(
    "family, before, after",
    [
        ("dense", "fsdp=8", "data=2, tensor=2"),
        ("capacity", "fsdp=2, expert=4", "expert=2, tensor=2"),
        ("capacity", "expert=4", "fsdp=2, expert=4"),
        ("capacity", "expert=8", "fsdp=4"),
        ("moe", "fsdp=8", "fsdp=2, sequence=2"),
    ],
)
def test_a_checkpoint_goes_on_on_another_mesh(family, before, after, tmp_path):
    """Of as many devices, fewer or more."""
    first, second = (
        sharding.make_mesh(spec, jax.devices()[: np.prod([int(axis.split("=")[1]) for axis in spec.split(",")])])
        for spec in (before, after)
    )
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    curve, state = run(family, first, steps=range(2))
    checkpoints.save(2, state, {})
    checkpoints.wait()
    state, _ = checkpoints.restore_newest(compiled(family, second)[1])
    checkpoints.close()
    rest, _ = run(family, second, state, range(2, STEPS))
    np.testing.assert_allclose(np.concatenate([curve, rest]), one_device(family), rtol=1e-5)
