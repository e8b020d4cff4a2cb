"""Chunked cross-entropy: values and gradients of the plain form on any mesh, without the logits of a row."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import hlo
from configs import base
from efficientllm import sharding
from efficientllm.architecture import from_config
from efficientllm.objectives import cross_entropy
from efficientllm.runtime import kernel_choice
from efficientllm.train import step
from efficientllm.weights import activation_dtype, matmul
from tiers import slow_case, slow_except

B, D, V = 8, 20, 64
SCALE = 2.0**-6  # of the loss; a power of two, so that low precision rounds its gradient where it rounds the sum's


def inputs(T, dtype=np.float32, vocab=V):
    """Activations, a head and a batch, a third of whose targets have no weight."""
    rng = np.random.default_rng(T)
    batch = {"targets": rng.integers(0, vocab, (B, T), np.int32)}
    batch["weights"] = rng.choice(np.float32([0, 1, 2.5]), (B, T))
    x_BTD, head_DV = (rng.standard_normal(shape, np.float32) for shape in ((B, T, D), (D, vocab)))
    return jnp.asarray(x_BTD, dtype), head_DV, batch


def whole(x_BTD, head_DV, batch, precision):
    """SCALE times the loss by its definition."""
    logits_BTV = matmul(x_BTD, head_DV, precision, out_dtype=jnp.float32)
    nll_BT = -jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), batch["targets"][..., None], -1)[..., 0]
    return SCALE * jnp.sum(nll_BT * batch["weights"])


def ours(x_BTD, head_DV, batch, precision):
    return SCALE * cross_entropy.nll_sum(x_BTD, head_DV, batch, precision)


def close(actual, expected, tolerance):
    """The greatest error is within `tolerance` of the greatest value."""
    actual, expected = (np.asarray(leaf, np.float32) for leaf in (actual, expected))
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


CASES = [("float32", 24, 3), ("float32", 23, 3), ("float32", 5, 5), ("float32", 8, 1)]
CASES += [("mixed", 23, 3), ("bfloat16", 23, 3), ("bfloat16", 24, 3)]


@pytest.mark.parametrize("precision, T, chunks", slow_except(CASES, ("float32", 23, 3), ("bfloat16", 23, 3)))
def test_values_and_gradients(monkeypatch, precision, T, chunks):
    """Rows that chunks of 8 tokens divide and do not; and tokens larger than a chunk."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * B * V * (0.5 if chunks == T else 8))
    x_BTD, head_DV, batch = inputs(T, activation_dtype(precision))
    with kernel_choice.recording_kernels() as used:
        actual = jax.jit(jax.value_and_grad(ours, (0, 1)), static_argnums=3)(x_BTD, head_DV, batch, precision)
    assert used == {"loss": {"chunked" if chunks > 1 else "whole"}}
    assert cross_entropy.count_chunks(B, T, V) == chunks
    value, (dx_BTD, dhead_DV) = jax.jit(jax.value_and_grad(whole, (0, 1)), static_argnums=3)(
        x_BTD, head_DV, batch, precision
    )
    close(actual[0], value, 1e-6)
    assert (actual[1][0].dtype, actual[1][1].dtype) == (x_BTD.dtype, jnp.float32)
    close(actual[1][0], dx_BTD, 2**-8 if precision == "bfloat16" else 1e-6)
    # Rounded to bfloat16 once in the whole form, once a chunk in the other.
    close(actual[1][1], dhead_DV, 2**-7 if precision == "bfloat16" else 1e-6)
    close(ours(x_BTD, head_DV, batch, precision), value, 1e-6)  # as evaluation takes it, without a gradient


def test_chunks_are_few_and_fit(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * B * V * 10 + 3)
    for T in range(1, 200):
        chunks = cross_entropy.count_chunks(B, T, V)
        tokens = -(-T // chunks)
        assert tokens <= 10 and chunks == -(-T // 10) and chunks * tokens - T < chunks


def with_misses(x_BTD, head_DV, batch, precision):
    nats, misses_BT = cross_entropy.nll_sum_and_misses(x_BTD, head_DV, batch, precision)
    return SCALE * nats, misses_BT


def inputs_with_hits(T, vocab=V):
    """`inputs`, half of whose targets are the likeliest token."""
    x_BTD, head_DV, batch = inputs(T, vocab=vocab)
    likeliest_BT = jnp.argmax(matmul(x_BTD, head_DV, "float32", out_dtype=jnp.float32), -1)
    is_hit_BT = np.random.default_rng(T).random((B, T)) < 0.5
    batch["targets"] = np.where(is_hit_BT, likeliest_BT, batch["targets"]).astype(np.int32)
    return (x_BTD, head_DV, batch), batch["targets"] != likeliest_BT


@pytest.mark.parametrize("T, chunks", [(24, 3), (23, 3), (8, 1)])
def test_misses_are_targets_that_are_not_the_likeliest(monkeypatch, T, chunks):
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * B * V * 8)
    args, expected_BT = inputs_with_hits(T)
    assert cross_entropy.count_chunks(B, T, V) == chunks and 0.2 < np.mean(expected_BT) < 0.8
    value, misses_BT = jax.jit(with_misses, static_argnums=3)(*args, "float32")
    close(value, whole(*args, "float32"), 1e-6)
    np.testing.assert_array_equal(misses_BT, expected_BT)


def test_equal_logits_have_the_first_as_the_likeliest():
    batch = {"targets": np.array([[0, 3, 1]], np.int32), "weights": np.ones((1, 3), np.float32)}
    _, misses_BT = cross_entropy.nll_sum_and_misses(jnp.zeros((1, 3, D)), jnp.zeros((D, V)), batch, "float32")
    assert misses_BT.tolist() == [[False, True, True]]


@pytest.mark.parametrize(
    "mesh_spec, T", [("fsdp=2, tensor=2, sequence=2", 24), slow_case("data=2, tensor=4", 23), slow_case("fsdp=8", 5)]
)
def test_misses_on_eight_devices_equal_those_on_one(mesh_spec, T):
    args, expected_BT = inputs_with_hits(T)
    mesh = sharding.make_mesh(mesh_spec)
    with jax.set_mesh(mesh):
        where = [
            NamedSharding(mesh, sharding.spec(axes, leaf.shape, mesh))
            for axes, leaf in zip((("batch", "length", None), ("embed", "vocab")), args, strict=False)
        ]
        placed = jax.device_put(args, (*where, sharding.batch_sharding(mesh)))
        value, misses_BT = jax.jit(functools.partial(with_misses, precision="float32"))(*placed)
    close(value, whole(*args, "float32"), 1e-6)
    np.testing.assert_array_equal(misses_BT, expected_BT)


@pytest.mark.parametrize(
    "mesh_spec, T, vocab",
    [
        ("data=2, fsdp=2, tensor=2", 24, V),
        slow_case("fsdp=4, tensor=2", 23, V),
        slow_case("fsdp=2, tensor=4", 23, V),
        slow_case("fsdp=2, tensor=4", 23, V - 1),
        slow_case("fsdp=2, tensor=2, sequence=2", 24, V),
    ],
)
def test_eight_devices_equal_one(monkeypatch, mesh_spec, T, vocab):
    """The vocabulary split over `tensor`, or whole where it does not divide; each device makes its part of a chunk."""
    x_BTD, head_DV, batch = inputs(T, vocab=vocab)
    value, gradients = jax.value_and_grad(whole, (0, 1))(x_BTD, head_DV, batch, "float32")
    mesh = sharding.make_mesh(mesh_spec)
    rows = B // (mesh.shape["data"] * mesh.shape["fsdp"])
    columns = vocab // mesh.shape["tensor"] if vocab == V else vocab
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * rows * columns * 8)
    with jax.set_mesh(mesh):
        where = [
            NamedSharding(mesh, sharding.spec(axes, leaf.shape, mesh))
            for axes, leaf in ((("batch", "length", None), x_BTD), (("embed", "vocab"), head_DV))
        ]
        run = jax.jit(
            jax.value_and_grad(functools.partial(ours, precision="float32"), (0, 1)),
            in_shardings=(*where, sharding.batch_sharding(mesh)),
            out_shardings=(NamedSharding(mesh, P()), tuple(where)),
        )
        args = jax.device_put((x_BTD, head_DV, batch), (*where, sharding.batch_sharding(mesh)))
        compiled = run.lower(*args).compile()
        found_value, sharded_gradients = compiled(*args)
    close(found_value, value, 1e-6)
    jax.tree.map(lambda a, b: close(a, b, 2e-6), sharded_gradients, gradients)
    program = hlo.instructions(compiled.as_text())
    made = [(item.in_loop, shape) for item in program for shape in item.shapes]
    tokens = -(-T // mesh.shape["sequence"])
    tokens = -(-tokens // -(-tokens // 8))  # of a chunk: chunks of a row are the fewest, and alike
    assert any(in_loop and shape[-3:] == (rows, tokens, columns) for in_loop, shape in made)
    logits = [shape for _, shape in made if shape[-1] in (columns, vocab) and D not in shape]
    assert max(map(np.prod, logits)) == rows * tokens * columns
    moved = {shape for item in program if item.in_loop and "all-" in item.op for shape in item.shapes}
    assert not any(columns in shape for shape in moved), "the head or its gradient crosses devices in every chunk"


def _train_step(monkeypatch, chunk_bytes):
    """A compiled step of a small model of a large vocabulary, on one device; and what its loss runs on."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", chunk_bytes)
    config = base.get_config()
    config.model.unroll = 0
    config.model.size = "tiny(num_layers=1, dim=8, num_heads=1, num_kv_heads=1, head_dim=8, hidden=8)"
    lm = from_config.from_config(config.model, 151_936)
    mesh = sharding.make_mesh("data=1", jax.devices()[:1])
    length = 256
    batch = {
        name: jax.ShapeDtypeStruct((2, length), np.int32) for name in ("tokens", "targets", "segments", "positions")
    }
    batch["weights"] = jax.ShapeDtypeStruct((2, length), np.float32)
    with jax.set_mesh(mesh), kernel_choice.recording_kernels() as used:
        abstract = jax.eval_shape(step.init_state(lm, config.train, 0, length))
        shardings = sharding.shardings(abstract, mesh)
        lowered = step.jit_train_step(lm, config.train, mesh, shardings).lower(nn.unbox(abstract), batch)
        return lowered.compile(), used["loss"]


@pytest.mark.slow
def test_a_train_step_of_a_large_vocabulary_makes_no_whole_logits(monkeypatch):
    sizes = {}
    for chunk_bytes in (cross_entropy.CHUNK_BYTES, 2**40):
        compiled, (form,) = _train_step(monkeypatch, chunk_bytes)
        made = [np.prod(shape) for item in hlo.instructions(compiled.as_text()) for shape in item.shapes]
        sizes[form] = max(made), compiled.memory_analysis().temp_size_in_bytes
    logits = 2 * 256 * 151_936
    assert sizes["whole"][0] >= logits and sizes["whole"][1] >= 4 * logits
    assert sizes["chunked"][0] <= logits / 4
    assert sizes["chunked"][1] <= sizes["whole"][1] / 2, sizes
