"""Padding in mixtures of experts: its values and amount change no output, loss or gradient."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import contract
from efficientllm import model as models
from efficientllm import sharding
from efficientllm.ffns import dispatch
from efficientllm.ops.attention import Context
from efficientllm.registry import build
from efficientllm.train import step
from tiers import slow_case, slow_except

B, T, V = 8, 24, contract.VOCAB
LENGTHS = (24, 16, 9, 1, 0, 20, 13, 7)
MIXTURES = {
    "dropless": "moe(num_experts=8, top_k=2, hidden=32, bias_rate=0.001)",
    "capacity": "moe(num_experts=8, top_k=2, hidden=32, dispatch='capacity', capacity_factor=0.6)",
    "sigmoid": "moe(num_experts=8, top_k=2, hidden=32, scores='sigmoid', shared_hidden=16)",
}


def batch(length=T, seed=0, fill=0):
    """Rows of `LENGTHS` tokens, of two documents where there is room, and padding that holds random ids."""
    rng, ids = np.random.default_rng(seed), np.random.default_rng(7).integers(0, V, (B, T + 1), np.int32)
    index = np.arange(length)
    real = index < np.array(LENGTHS)[:, None]
    second = index >= 8
    at = np.minimum(index, T)

    def other():
        return rng.integers(0, V, (B, length), np.int32) if fill else np.zeros((B, length), np.int32)

    return {
        "tokens": np.where(real, ids[:, np.minimum(at, T - 1)], other()),
        "targets": np.where(real, ids[:, np.minimum(at + 1, T)], other()),
        "segments": np.where(real, 1 + second, 0).astype(np.int32),
        "positions": np.where(real, index - 8 * second, index if fill else 0).astype(np.int32),
        "weights": real.astype(np.float32),
    }


@functools.cache
def model(name):
    lm = contract.build("ffn", MIXTURES[name])
    params = contract.parameters(lm)
    for block in params["groups"].values():
        block["ffn"]["router"]["kernel"] = block["ffn"]["router"]["kernel"] * 10
    return lm, params


@functools.cache
def compiled(name, accumulate):
    return jax.jit(functools.partial(step.gradients, model(name)[0], accumulate=accumulate))


def gradients(name, packed, accumulate=1):
    """`(gradients, metrics)` of a step."""
    return jax.device_get(compiled(name, accumulate)(model(name)[1], packed))


def same(a, b, rtol=1e-5, atol=1e-7):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


@pytest.mark.parametrize("name", slow_except(MIXTURES, "capacity"))
def test_other_ids_in_the_padding_change_nothing(name):
    plain, filled = gradients(name, batch()), gradients(name, batch(seed=1, fill=1))
    jax.tree.map(np.testing.assert_array_equal, plain, filled)
    for aux in plain[1]["aux"]:
        np.testing.assert_allclose(aux["stats"]["load"].sum(-1), 1.0, rtol=1e-6)
        assert (aux["stats"]["drop_rate"] > 0.05).all() == (name == "capacity")


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_except(MIXTURES, "dropless"))
def test_rows_of_more_padding_have_the_same_losses_and_statistics(name):
    same(gradients(name, batch()), gradients(name, batch(length=64)), rtol=2e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh_spec",
    [slow_case("data=2, fsdp=2, tensor=2"), slow_case("fsdp=2, sequence=4"), "fsdp=2, expert=4"],
)
@pytest.mark.parametrize("name", ["dropless", "capacity"])
def test_eight_devices_leave_the_same_padding_out(name, mesh_spec):
    if name == "dropless" and "expert" in mesh_spec:
        pytest.skip("experts of no capacity are not sharded by expert")
    lm, params = model(name)
    mesh = sharding.make_mesh(mesh_spec)
    with jax.set_mesh(mesh):
        boxed = jax.eval_shape(lambda: models.init_params(lm, jax.random.key(0), T))
        where = sharding.shardings(boxed, mesh)
        rows = sharding.batch_sharding(mesh)
        run = jax.jit(functools.partial(step.gradients, lm, accumulate=1), in_shardings=(where, rows))
        results = [jax.device_get(run(jax.device_put(params, where), batch(seed=seed, fill=seed))) for seed in (0, 1)]
    jax.tree.map(np.testing.assert_array_equal, *results)
    same(gradients(name, batch()), results[0], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", [slow_case("dropless"), "capacity"])
def test_micro_batches_of_unequal_padding_count_by_their_tokens(name):
    """Statistics and the z-loss are those of the whole batch; a balance loss is a product, and each's own."""
    whole, accumulated = (gradients(name, batch(), accumulate)[1] for accumulate in (1, 4))
    for a, b in zip(whole["aux"], accumulated["aux"], strict=True):
        same(a["stats"], b["stats"])
        same(a["losses"]["z_loss"], b["losses"]["z_loss"])


def test_a_batch_of_padding_alone_has_no_losses():
    empty = batch() | {"segments": np.zeros((B, T), np.int32), "weights": np.zeros((B, T), np.float32)}
    grads, metrics = gradients("capacity", empty)
    assert metrics["total_loss"] == 0 and all((leaf == 0).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
def test_capacity_is_that_of_the_real_tokens():
    """A padded row drops what the same row without padding drops."""
    rng = np.random.default_rng(0)
    experts = rng.integers(0, 3, (2, 12, 2), np.int32)
    for factor in (0.3, 0.5, 1.0, 1.25):
        real = np.arange(12) < np.array([[7], [12]])
        padded = np.asarray(dispatch.capacity(experts, 4, factor, real).kept_nk).reshape(2, 12, 2)
        for row, length in enumerate((7, 12)):
            alone = dispatch.capacity(experts[row : row + 1, :length], 4, factor).kept_nk
            np.testing.assert_array_equal(padded[row, :length], alone)
            assert not padded[row, length:].any()


def test_capacity_by_length_is_the_formula():
    for experts, top_k, factor in ((8, 2, 1.25), (10, 1, 1.1), (64, 6, 0.7), (3, 3, 50.0)):
        expected = [dispatch.rows_per_expert(length, experts, top_k, factor) for length in range(130)]
        assert dispatch._rows_by_length(129, experts, top_k, factor).tolist() == expected


@pytest.mark.slow
def test_an_ffn_is_given_the_context_if_it_asks():
    x_BTD = jnp.ones((1, 4, 16))
    moe = build("ffn", MIXTURES["dropless"], {"precision": "float32"})
    params = nn.unbox(moe.init(jax.random.key(0), x_BTD)["params"])
    ctx = Context.packed(jnp.arange(4)[None], jnp.array([[1, 1, 0, 0]]))
    losses = [moe.apply({"params": params}, *arguments)[1]["losses"] for arguments in ((x_BTD[:, :2],), (x_BTD, ctx))]
    same(*losses)
