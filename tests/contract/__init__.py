"""Contract suite: checks that every registered technique must pass. test_contract.py runs them over the registry.

A technique is tested in a tiny two-layer model in which nothing else is changed.
"""

import functools
import typing
import unittest.mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from contract import reasons
from efficientllm import model, registry
from efficientllm.adapters import base as adapters
from efficientllm.adapters.lora import LoRA
from efficientllm.architecture import from_config
from efficientllm.cost import formulas
from efficientllm.cost.jaxpr_flops import count_matmul_flops
from efficientllm.objectives.next_token import NEXT_TOKEN
from efficientllm.ops.attention import Context
from efficientllm.quant import apply as quant
from efficientllm.quant import matmul
from efficientllm.quant.apply import quantize
from efficientllm.quant.base import Rows
from efficientllm.weights import box_as

SIZE = "tiny(num_layers=2, dim=32, num_heads=4, num_kv_heads=2, head_dim=8, hidden=48)"
VOCAB, B, T = 64, 8, 24
LAYERS = ("mixer", "ffn")
# Techniques whose compiled checks are in the quick tier: for forward passes those with code of their own, for training
# steps one of each kind.
DISTINCT = ("gqa", "mla", "mamba", "rwkv", "swiglu", "moe", "rope", "relative")
TYPICAL = ("gqa", "swiglu", "rope", "relative")
CHECKS = []


class Check(typing.NamedTuple):
    """A check of the techniques of `kinds`. It is quick for the names in `quick` (None: all), else of the full tier."""

    run: typing.Callable[[str, str], None]
    kinds: tuple[str, ...]
    quick: tuple[str, ...] | None


def check(*kinds, quick=None):
    """Registers a function of `(kind, spec)` as a check of the contract suite."""

    def declare(function):
        CHECKS.append(Check(function, kinds, quick))
        return function

    return declare


def build(kind, spec, **changes):
    """Builds a model with the technique `spec` as its `kind`."""
    config = base.get_config().model
    config.size, config.unroll = SIZE, 0  # a loop, as on accelerators: half the compilation
    config[kind] = spec
    for key, value in changes.items():
        config[key] = value
    return from_config.from_config(config, VOCAB)


@functools.cache
def parameters(lm, seed=0):
    """Random unboxed parameters. Noise is added to biases and scales too: zeros and ones would hide mistakes."""
    init = jax.jit(lambda: lm.init(jax.random.key(seed), tokens(), Context.packed(positions())))
    noise = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: leaf + 0.1 * noise.standard_normal(leaf.shape, np.float32), nn.unbox(init()["params"])
    )


def tokens(seed=0, length=T):
    return np.random.default_rng(seed).integers(0, VOCAB, (B, length), np.int32)


def positions(length=T, rows=B):
    return np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))


def logits(lm, tokens_BT, params=None, ctx=None):
    params = parameters(lm) if params is None else params
    rows, length = tokens_BT.shape
    ctx = Context.packed(positions(length, rows)) if ctx is None else ctx
    return _forward(lm)(params, tokens_BT, ctx)


@functools.cache
def _forward(lm):
    return jax.jit(lambda params, tokens_BT, ctx: lm.apply({"params": params}, tokens_BT, ctx)[0])


def batch():
    """Rows of two documents, of 10 and T - 10 tokens."""
    ids, index = tokens(length=T + 1), np.arange(T, dtype=np.int32)
    rows = np.ones((B, 1), np.int32)
    return {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "segments": np.where(index < 10, 1, 2).astype(np.int32) * rows,
        "positions": np.where(index < 10, index, index - 10) * rows,
        "weights": np.ones((B, T), np.float32),
    }


@check(*LAYERS, quick=TYPICAL)
def check_dtypes(kind, spec):
    """Logits are float32 under every precision, and near those in float32."""
    exact = logits(build(kind, spec), tokens())
    for precision, tolerance in (("float32", 0), ("mixed", 0.05), ("bfloat16", 0.1)):
        lm = build(kind, spec, precision=precision)
        logits_BTV = logits(lm, tokens(), parameters(build(kind, spec)))
        of_type = logits_BTV.dtype == jnp.float32 and logits_BTV.shape == (B, T, VOCAB)
        assert of_type, reasons.of("dtype", kind, spec, f"{precision}: {logits_BTV.dtype} {logits_BTV.shape}")
        error = jnp.linalg.norm(logits_BTV - exact) / jnp.linalg.norm(exact)
        assert error <= tolerance, reasons.of("precision", kind, spec, f"{precision}: {error:.3g} from float32's")


@check(*LAYERS, quick=DISTINCT)
def check_causality(kind, spec):
    """Outputs depend on earlier tokens alone, and on the token itself."""
    lm, before = build(kind, spec), tokens()
    after = before.copy()
    after[:, 15] = (before[:, 15] + 1) % VOCAB
    a, b = logits(lm, before), logits(lm, after)
    np.testing.assert_array_equal(a[:, :15], b[:, :15], reasons.of("causality", kind, spec))
    assert jnp.abs(a[:, 15] - b[:, 15]).max() > 1e-3, reasons.of("input", kind, spec)


@check(*LAYERS, "position", quick=DISTINCT)
def check_segments(kind, spec):
    """A document packed behind another has the logits that it has alone."""
    lm = build(kind, spec)
    packed = batch()
    together = logits(lm, packed["tokens"], ctx=Context.packed(packed["positions"], packed["segments"]))
    alone = logits(lm, packed["tokens"][:, 10:])
    np.testing.assert_allclose(together[:, 10:], alone, atol=1e-5, err_msg=reasons.of("segments", kind, spec))


@check(*LAYERS, "position", quick=DISTINCT)
def check_decode(kind, spec):
    """Prefill and decoding token by token give the logits of the full forward pass, scanned and unrolled."""
    lm = build(kind, spec)
    full = logits(lm, tokens())
    for prefill, decoder, params in ((7, lm, parameters(lm)), (1, *model.unroll(lm, parameters(lm)))):
        run = jax.jit(lambda p, t, c, s, m=decoder: m.apply({"params": p}, t, c, s)[:2])
        states, pieces = model.init_states(decoder, B, T), []
        for start, stop in [(0, prefill)] + [(t, t + 1) for t in range(prefill, T)]:
            ctx = Context.decoding(positions()[:, start:stop])
            piece, states = run(params, tokens()[:, start:stop], ctx, states)
            pieces.append(piece)
        why = reasons.of("decode", kind, spec, f"after {prefill} at once, {'stacked' if decoder.scan else 'unrolled'}")
        np.testing.assert_allclose(jnp.concatenate(pieces, 1), full, atol=2e-5, err_msg=why)


def loss_and_gradients(lm, params):
    packed = batch()
    (loss, _), grads = jax.value_and_grad(functools.partial(loss_fn, lm), has_aux=True)(
        params, packed, jnp.sum(packed["weights"])
    )
    return loss, grads


def loss_fn(lm, params, batch, targets):
    """Computes `(loss, metrics)` of a batch that is the whole step."""
    return NEXT_TOKEN.loss(lm, params, batch, None, (targets, None))


@functools.cache
def unsharded(lm):
    """`loss_and_gradients` on one device, with scanned layers."""
    return jax.jit(functools.partial(loss_and_gradients, lm))(parameters(lm))


@check(*LAYERS, "position", quick=TYPICAL)
def check_gradients(kind, spec):
    """Gradients are finite, and none is all zero."""
    lm = build(kind, spec)
    _, grads = unsharded(lm)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        assert jnp.isfinite(grad).all(), reasons.of("finite", kind, spec, name)
        assert jnp.abs(grad).max() > 0, reasons.of("gradient", kind, spec, name)


@check(*LAYERS, quick=TYPICAL)
def check_scan(kind, spec):
    """Scanned, unrolled and rematerialized layers give equal losses and gradients."""
    lm = build(kind, spec)
    loop, loop_params = model.unroll(lm, parameters(lm))
    loss, grads = unsharded(lm)
    loop_loss, loop_grads = jax.jit(functools.partial(loss_and_gradients, loop))(loop_params)
    why = reasons.of("scan", kind, spec)
    np.testing.assert_allclose(loss, loop_loss, rtol=1e-6, err_msg=why)
    close(model.unroll(lm, grads)[1], loop_grads, 1e-5, why)
    again, remat_grads = jax.jit(functools.partial(loss_and_gradients, lm.clone(remat="full")))(parameters(lm))
    why = reasons.of("remat", kind, spec)
    np.testing.assert_allclose(loss, again, rtol=1e-6, err_msg=why)
    close(grads, remat_grads, 1e-5, why)


@check(*LAYERS, quick=TYPICAL)
def check_compressed(kind, spec):
    """Quantized kernels (int4 and int8) give the logits of their dequantized arrays, scanned and unrolled.

    Unrolled, the products for few rows are used. Those of int4 round activations to 16 bits.
    """
    lm = build(kind, spec)
    packed = quantize(parameters(lm), "int8", [("(mixer|experts)/", "int4")])
    plain = adapters.merge(packed)
    leaves = jax.tree.leaves(packed, is_leaf=lambda leaf: isinstance(leaf, Rows))
    assert any(isinstance(leaf, Rows) for leaf in leaves), reasons.of("kernels", kind, spec)
    exact, why = logits(lm, tokens(), plain), reasons.of("compressed", kind, spec)
    np.testing.assert_allclose(logits(lm, tokens(), packed), exact, atol=2e-5, err_msg=why)
    with unittest.mock.patch.object(matmul, "FEW_ROWS", B * T * 8):
        loop, packed = model.unroll(lm, packed)
        error = jnp.linalg.norm(logits(loop, tokens(), packed) - exact) / jnp.linalg.norm(exact)
    assert error < 1e-3, why


@check(*LAYERS)
def check_flops(kind, spec):
    """The FLOP formulas equal the count over the jaxpr, including pairs that are computed and masked.

    Experts are ragged products here, and selected blocks masked ones. The loops of other kernels have trip counts that
    a jaxpr does not show.
    """
    spec = registry.complete_spec(kind, spec, {"kernel": "ragged_dot", "block_kernel": "masked"})
    for kernel in ("xla", "chunked"):
        lm = build(kind, spec, attention_kernel=kernel)
        length = 160
        boxed = model.abstract_params(lm)
        ctx = Context.packed(positions(length))
        forward = functools.partial(lm.apply, tokens_BT=tokens(length=length), ctx=ctx)
        counted = count_matmul_flops(forward, {"params": nn.unbox(boxed)})
        claimed = B * formulas.forward_flops(lm, boxed, length, executed=True)
        assert counted == claimed, reasons.flops(kind, spec, lm, boxed, length, counted / B)


@check(*LAYERS, quick=TYPICAL)
def check_leaves(kind, spec):
    """An adapter around int4 kernels gives the logits of the merged kernels."""
    lm = build(kind, spec)
    boxed = model.abstract_params(lm)
    method = registry.build("adapter", "lora(rank=2, alpha=4)")

    def wrapped(params):
        packed = quant.quantize(box_as(boxed, params), "int4(group=32)")
        return nn.unbox(adapters.attach(method, boxed, packed, jax.random.key(0)))

    params = jax.jit(wrapped)(parameters(lm))
    noise = np.random.default_rng(0)

    def moved(leaf):
        return leaf.replace(b=leaf.b + 0.1 * noise.standard_normal(leaf.b.shape, np.float32))

    def is_lora(leaf):
        return isinstance(leaf, LoRA)

    params = jax.tree.map(lambda leaf: moved(leaf) if is_lora(leaf) else leaf, params, is_leaf=is_lora)
    assert any(map(is_lora, jax.tree.leaves(params, is_leaf=is_lora))), reasons.of("kernels", kind, spec)
    merged, why = logits(lm, tokens(), adapters.merge(params)), reasons.of("adapters", kind, spec)
    np.testing.assert_allclose(logits(lm, tokens(), params), merged, atol=1e-4, err_msg=why)


@check(*LAYERS)
def check_state_bytes(kind, spec):
    """The formula for the decode state gives the bytes of its arrays."""
    for precision in ("float32", "bfloat16"):
        lm = build(kind, spec, precision=precision)
        states = jax.eval_shape(lambda m=lm: model.init_states(m, 3, 40))
        real = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(states))
        claimed = formulas.state_bytes(lm, 40)
        detail = f"{precision}, all layers, 40 tokens: {claimed:,.0f} bytes by formula, {real / 3:,.0f} there are"
        assert real == 3 * claimed, reasons.of("state", kind, spec, detail)


def close(a, b, atol, why):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-4, err_msg=why), a, b)
