"""GPTQ and AWQ against their algorithms written as loops, and over a model; others' checkpoints by formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import contract
from efficientllm import model as models
from efficientllm.errors import UserError
from efficientllm.quant import calibrate, foreign_layouts
from efficientllm.quant.apply import quantize
from efficientllm.quant.awq import awq, output_error, rounded
from efficientllm.quant.gptq import gptq
from efficientllm.quant.int4 import Int4, decode
from efficientllm.weights import Weight, matmul
from tiers import slow_case

GROUP = 32


def layer(K=160, R=24, rows=400, seed=0):
    """Weights `[R, K]` and inputs `[rows, K]` that are correlated, some large, one always 0."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, K)) @ (np.eye(K) + 0.3 * rng.standard_normal((K, K)) / np.sqrt(K))
    x *= np.exp(rng.standard_normal(K))
    x[:, 7] = 0
    return rng.standard_normal((R, K)) * np.exp(0.3 * rng.standard_normal(K)), x


def group_scales(w, symmetric):
    """(scale, zero) of each weight, from its group as it is."""
    scale, zero = np.zeros_like(w), np.full_like(w, 8)
    for g in range(0, w.shape[1], GROUP):
        group = w[:, g : g + GROUP]
        low, high = np.minimum(group.min(1), 0), np.maximum(group.max(1), 0)
        s = np.abs(group).max(1) / 7.5 if symmetric else (high - low) / 15
        scale[:, g : g + GROUP] = s.astype(np.float16)[:, None]
        if not symmetric:
            zero[:, g : g + GROUP] = np.clip(np.round(-low / s.astype(np.float16).astype(float)), 0, 15)[:, None]
    return scale, zero


def rtn(w, symmetric):
    scale, zero = group_scales(w, symmetric)
    return (np.clip(np.round(w / scale) + zero, 0, 15) - zero) * scale


def gptq_by_loop(w, hessian, symmetric):
    """Algorithm 1 of arXiv:2210.17323 without blocks; a group's scales are those of its weights at its turn."""
    w, hessian = w.copy(), hessian.copy()
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1
    w[:, dead] = 0
    hessian += 0.01 * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    q = np.zeros_like(w)
    for i in range(w.shape[1]):
        if i % GROUP == 0:
            scale, zero = group_scales(w, symmetric)
        q[:, i] = (np.clip(np.round(w[:, i] / scale[:, i]) + zero[:, i], 0, 15) - zero[:, i]) * scale[:, i]
        error = (w[:, i] - q[:, i]) / upper[i, i]
        w[:, i:] -= np.outer(error, upper[i, i:])
    return q


def moments(x):
    return jnp.asarray(x.T @ x / len(x), jnp.float32)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_is_the_loop_and_beats_rounding(symmetric):
    w, x = layer()
    codes, scale, zero = gptq(jnp.asarray(w, jnp.float32), moments(x), GROUP, symmetric)
    zero = None if zero is None else zero[..., None]
    decoded = np.asarray(decode(codes, scale[..., None], zero), np.float64).reshape(w.shape)
    exact = gptq_by_loop(w, x.T @ x / len(x), symmetric)
    # A float32 factor may round a weight at the edge to the other side, which later columns then make up for.
    assert np.mean(np.isclose(decoded, exact, rtol=1e-4, atol=1e-6)) > 0.99

    def error(q):
        return np.mean((x @ (w - q).T) ** 2)

    assert error(decoded) < 0.85 * error(rtn(w, symmetric))
    assert error(decoded) < 1.01 * error(exact)


def awq_by_loop(w, x, symmetric):
    """Both forms of the scales of llmcompressor's grid, each on the outputs of the inputs themselves."""
    sizes = np.abs(w).reshape(len(w), -1, GROUP)
    weight = np.mean((sizes / (sizes.max(-1, keepdims=True) + 1e-6)).reshape(w.shape), 0)
    mean = np.mean(np.abs(x), 0)
    best = (np.inf, None)
    for is_duo in (True, False):
        for i in range(20):
            ratio = i / 20
            s = np.maximum(mean**ratio / (weight ** (1 - ratio) + 1e-4) if is_duo else mean**ratio, 1e-4)
            s = 1 / (1 / (s / np.sqrt(s.max() * s.min()))).astype(np.float16).astype(np.float64)
            error = np.mean((x @ (rtn(w * s, symmetric) / s - w).T) ** 2)
            best = min(best, (error, i, is_duo, tuple(s)))
    return best


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_is_the_search_and_beats_rounding(symmetric):
    w, x = layer()
    x[:, 7] = 0.01 * x[:, 8]
    rows, hessian = jnp.asarray(w, jnp.float32), moments(x)
    s = awq(rows, hessian, jnp.mean(jnp.abs(jnp.asarray(x, jnp.float32)), 0), GROUP, symmetric)
    error, *_, exact = awq_by_loop(w, x, symmetric)
    np.testing.assert_allclose(s, exact, rtol=2e-3)
    awq_error = output_error(rounded(rows * s, GROUP, symmetric) / s - rows, hessian)
    np.testing.assert_allclose(awq_error, error, rtol=1e-2)
    assert error < 0.9 * np.mean((x @ (rtn(w, symmetric) - w).T) ** 2)


@pytest.fixture(scope="module")
def small():
    """A model, tokens, and the change of its last hidden states by a compressed tree."""
    lm = contract.build(
        "mixer", "gqa", size="tiny(num_layers=2, dim=64, num_heads=4, num_kv_heads=2, head_dim=16, hidden=96)"
    )
    params, ids = contract.parameters(lm), np.random.default_rng(3).integers(0, contract.VOCAB, (8, 48), np.int32)
    ctx = contract.Context.packed(contract.positions(48, 8))
    run = jax.jit(lambda params: lm.apply({"params": params}, ids, ctx, readout=False)[0])
    exact = run(params)
    return lm, params, ids, lambda changed: float(jnp.linalg.norm(run(changed) - exact) / jnp.linalg.norm(exact))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", slow_case("awq")])
def test_calibration_of_a_model_beats_rounding(small, method):
    lm, params, ids, change = small
    spec = f"int4(method='{method}')"
    calibrated = calibrate.quantize(lm, params, spec, ids)
    assert 0 < change(calibrated) < change(quantize(params, "int4"))
    leaves = jax.tree.leaves(calibrated, is_leaf=lambda leaf: isinstance(leaf, Weight))
    assert sum(isinstance(leaf, Int4) for leaf in leaves) == 7
    # Stacked layers and layers apart are calibrated alike.
    apart = calibrate.quantize(*models.unroll(lm, params), spec, ids)
    jax.tree.map(np.testing.assert_array_equal, models.unroll(lm, calibrated)[1], apart)


@pytest.mark.slow
def test_experts_are_calibrated():
    one_layer = contract.SIZE.replace("num_layers=2", "num_layers=1")
    lm = contract.build("ffn", "moe(num_experts=4, top_k=2, hidden=32)", size=one_layer)
    calibrated = calibrate.quantize(lm, contract.parameters(lm), "int4(method='gptq')", contract.tokens())
    experts = calibrated["groups"]["block_0"]["ffn"]["experts"]["gate"]["kernel"]
    assert experts.shape == (1, 4, 32, 32) and experts.scale.shape == (1, 4, 32, 1)
    assert jnp.isfinite(contract.logits(lm, contract.tokens(), calibrated)).all()


@pytest.mark.slow
def test_only_layers_are_calibrated(small):
    lm, params, ids, _ = small
    with pytest.raises(UserError, match="embedding is not in a layer"):
        calibrate.quantize(lm, params, "int4(method='gptq', embedding=\"int4(method='gptq')\")", ids)


def test_gptq_checkpoints():
    """Every code by its place in the words (AutoGPTQ's layout), for both versions of the format."""
    rng = np.random.default_rng(0)
    codes, zeros = rng.integers(0, 16, (64, 16)), rng.integers(1, 16, (2, 16))
    scales = rng.random((2, 16)).astype(np.float16)
    qweight, qzeros, stored = np.zeros((8, 16), np.uint32), np.zeros((2, 2), np.uint32), zeros - 1
    for k in range(64):
        qweight[k // 8] |= (codes[k] << 4 * (k % 8)).astype(np.uint32)
    for n in range(16):
        qzeros[:, n // 8] |= (stored[:, n] << 4 * (n % 8)).astype(np.uint32)
    exact = (codes - zeros.repeat(32, 0)) * scales.astype(np.float32).repeat(32, 0)
    words = qweight.view(np.int32), qzeros.view(np.int32)
    np.testing.assert_array_equal(foreign_layouts.from_gptq(*words, scales, np.arange(64) // 32).dense(), exact)
    other = (codes - stored.repeat(32, 0)) * scales.astype(np.float32).repeat(32, 0)
    np.testing.assert_array_equal(foreign_layouts.from_gptq(*words, scales, version=2).dense(), other)
    with pytest.raises(UserError, match="desc_act"):
        foreign_layouts.from_gptq(*words, scales, np.arange(64) % 2)


def test_awq_checkpoints():
    """Every code by its place in the words (AutoAWQ's GEMM layout)."""
    rng = np.random.default_rng(0)
    codes, zeros = rng.integers(0, 16, (64, 16)), rng.integers(0, 16, (2, 16))
    scales = rng.random((2, 16)).astype(np.float16)

    def pack(x):
        words = np.zeros((len(x), 2), np.uint32)
        for n in range(2):
            for i, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                words[:, n] |= (x[:, 8 * n + column] << 4 * i).astype(np.uint32)
        return words.view(np.int32)

    leaf = foreign_layouts.from_awq(pack(codes), pack(zeros), scales)
    exact = (codes - zeros.repeat(32, 0)) * scales.astype(np.float32).repeat(32, 0)
    np.testing.assert_array_equal(leaf.dense(), exact)
    x = jnp.asarray(rng.standard_normal((2, 64)), jnp.float32)
    np.testing.assert_allclose(matmul(x, jax.tree.map(jnp.asarray, leaf), "float32"), x @ exact, atol=2e-3)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_gguf_blocks(kind):
    """As the gguf package decompresses them."""
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    type_ = gguf.GGMLQuantizationType[kind]
    raw = gguf.quants.quantize(rng.standard_normal((6, 96)).astype(np.float32), type_)
    leaf = foreign_layouts.from_gguf(kind, raw.reshape(6, 3, -1))
    np.testing.assert_allclose(leaf.T.dense(), gguf.quants.dequantize(raw, type_), rtol=1e-6, atol=1e-7)
    assert leaf.shape == (96, 6)
    with pytest.raises(UserError, match="Q5_0"):
        foreign_layouts.from_gguf("Q5_0", raw.reshape(6, 3, -1))
