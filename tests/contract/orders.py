"""Contract checks of the orders of tokens: rows that are read in both directions, and blocks in a causal row.

A mixer is alone here, without positions: all that it knows of order is the mask's.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contract import B, T, build, check, positions, reasons
from efficientllm import model, registry, sharding
from efficientllm.architecture import from_config
from efficientllm.cost.jaxpr_flops import count_matmul_flops
from efficientllm.errors import UserError
from efficientllm.ops.attention import Context, Mask

DIM = 32
# Documents of 10 and 9 tokens, then padding.
SEGMENTS = np.repeat([[1, 2, 0]], [10, 9, 5], axis=1) * np.ones((B, 1), np.int32)
ANYHOW = np.random.default_rng(1).permutation(T)
MIRRORED = np.arange(T)[::-1]
BLOCKS = np.arange(T).reshape(-1, 4)[np.random.default_rng(2).permutation(T // 4)].reshape(-1)
# What a mixer with a notion of near tokens or blocks does not notice; others take tokens in any order.
PERMUTATIONS = {
    "window": (MIRRORED, {}),
    "mamba": (MIRRORED, {}),
    "mamba2": (MIRRORED, {}),
    "moba": (BLOCKS, {}),
    "nsa": (BLOCKS, {"compress_stride": 4, "window": T}),  # blocks that do not overlap, and no near tokens
}


def _changed(spec, **fields):
    name, values = registry.parse_spec(spec)
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in (values | fields).items())})"


@functools.cache
def of_order(spec, order, **changes):
    """`(mixer, random parameters)`; None for a mixer that refuses the order, which is checked."""
    lm = build("mixer", spec, position="none", ffn="none" if "mamba" in spec else "swiglu", **changes)
    mixer = model.parts(lm)[0].mixers[0]
    if order not in mixer.orders:
        with pytest.raises(UserError, match=r"^config.model.mixer = .* reads tokens in causal .*; take one out of"):
            from_config.check_order(lm.blocks, order)
        return None
    from_config.check_order(lm.blocks, order)
    shapes = nn.unbox(jax.eval_shape(mixer.init, jax.random.key(0), tokens(), Context.whole(positions())))["params"]
    noise = np.random.default_rng(0)
    return mixer, jax.tree.map(
        lambda leaf: noise.standard_normal(leaf.shape, np.float32) / max(1, leaf.shape[0]) ** 0.5, shapes
    )


def tokens(length=T, seed=0):
    return np.random.default_rng(seed).standard_normal((B, length, DIM), np.float32)


def whole(segments=None, length=T):
    return Context.whole(positions(length), segments)


def outputs(mixer, params, x_BTD, ctx):
    return _forward(mixer)(params, x_BTD, ctx)


@functools.cache
def _forward(mixer):
    return jax.jit(lambda params, x_BTD, ctx: mixer.apply({"params": params}, x_BTD, ctx)[0])


@check("mixer", quick=("gqa", "nsa"))
def check_both_directions(kind, spec):
    """A bidirectional mixer reads tokens on both sides, of its own segment, and no padding; or it is refused."""
    model = of_order(spec, "bidirectional")
    if model is None:
        return
    mixer, params = model
    x, ctx, why = tokens(), whole(SEGMENTS), reasons.of("directions", kind, spec)
    y = outputs(mixer, params, x, ctx)
    alone = outputs(mixer, params, x[:, 10:19], whole(length=9))
    np.testing.assert_allclose(y[:, 10:19], alone, atol=1e-5, err_msg=reasons.of("segments", kind, spec))
    other = x.copy()
    other[:, 19:] += 3.0
    unpadded = outputs(mixer, params, other, ctx)[:, :19]
    np.testing.assert_allclose(unpadded, y[:, :19], atol=1e-5, err_msg=why + ": padding is read")
    other = x.copy()
    other[:, 14] += 1.0
    moved = np.abs(outputs(mixer, params, other, ctx) - y).max((0, 2))
    assert moved[10:14].max() > 1e-3 and moved[15:19].max() > 1e-3, why


@check("mixer", quick=("gqa", "nsa"))
def check_permutation(kind, spec):
    """Where a mixer has no position, tokens in another order have the same outputs in that order."""
    name = registry.parse_spec(spec)[0]
    permutation, fields = PERMUTATIONS.get(name, (ANYHOW, {}))
    model = of_order(_changed(spec, **fields), "bidirectional")
    if model is None:
        return
    mixer, params = model
    y, permuted = (outputs(mixer, params, x, whole()) for x in (tokens(), tokens()[:, permutation]))
    why = reasons.of("permutation", kind, spec)
    np.testing.assert_allclose(permuted, y[:, permutation], atol=2e-5, err_msg=why)


@check("mixer", quick=("gqa",))
def check_order_gradients(kind, spec):
    """Gradients of a bidirectional row with padding are finite, and none is all zero."""
    model = of_order(spec, "bidirectional")
    if model is None:
        return
    mixer, params = model
    weights = np.where(SEGMENTS > 0, 1.0, 0.0)[..., None]

    def loss(params):
        return jnp.sum(mixer.apply({"params": params}, tokens(), whole(SEGMENTS))[0] ** 2 * weights)

    for path, grad in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        name = jax.tree_util.keystr(path)
        assert jnp.isfinite(grad).all(), reasons.of("finite", kind, spec, name)
        assert jnp.abs(grad).max() > 0, reasons.of("gradient", kind, spec, name)


@check("mixer", quick=("gqa",))
def check_order_kernels(kind, spec):
    """Attention kernels give the same outputs of a bidirectional row, on one device and on eight."""
    model = of_order(spec, "bidirectional")
    if model is None or not hasattr(model[0], "attention_kernel"):
        return
    mixer, params = model
    y, why = outputs(mixer, params, tokens(), whole(SEGMENTS))[:, :19], reasons.of("kernels of order", kind, spec)
    for kernel in ("chunked", "splash"):
        of_kernel = outputs(mixer.clone(attention_kernel=kernel), params, tokens(), whole(SEGMENTS))[:, :19]
        np.testing.assert_allclose(of_kernel, y, atol=2e-5, err_msg=f"{why} ({kernel})")
    with jax.set_mesh(sharding.make_mesh("data=2, sequence=4")):
        sharded = jax.jit(lambda *args: mixer.apply({"params": params}, *args)[0])(tokens(), whole(SEGMENTS))
    np.testing.assert_allclose(sharded[:, :19], y, atol=2e-5, err_msg=f"{why} (eight devices)")


@check("mixer", quick=("gqa",))
def check_order_flops(kind, spec):
    """The FLOP formulas of a bidirectional row equal the count over the jaxpr, and are more than a causal row's."""
    spec, length = registry.complete_spec(kind, spec, {"block_kernel": "masked"}), 160
    ctx = Context.whole(positions(length, 1))
    for kernel in ("xla", "chunked"):
        model = of_order(spec, "bidirectional", attention_kernel=kernel)
        if model is None:
            return
        mixer, params = model
        leaves = jax.tree_util.tree_leaves_with_path(params)
        sizes = {"/".join(key.key for key in keys): leaf.size for keys, leaf in leaves}
        rows = {path: mixer.kernel_rows(f"/{path}", length, "bidirectional") for path in sizes}
        kernels = sum(2 * rows[path] * size for path, size in sizes.items() if path.endswith("kernel"))
        claimed = kernels + mixer.mix_flops(length, True, "bidirectional")
        program = functools.partial(mixer.apply, x_BTD=tokens(length), ctx=ctx)
        counted = count_matmul_flops(program, {"params": params}) / B
        assert counted == claimed, f"{kind} {spec}: {counted:,.0f} FLOPs in both directions, not {claimed:,.0f}"
    assert mixer.mix_flops(length, False, "bidirectional") > mixer.mix_flops(length)


@check("mixer", quick=("gqa",))
def check_prefix(kind, spec):
    """Blocks of a causal row: none is causal, one is bidirectional, a picture before a text is both."""
    model = of_order(spec, "prefix")
    if model is None:
        return
    mixer, params = model
    x, why = tokens(), reasons.of("prefix", kind, spec)

    def of_blocks(blocks, segments=None):
        mask = Mask(segments, order="prefix", blocks_BT=jnp.asarray(blocks, jnp.int32) * jnp.ones((B, 1), jnp.int32))
        return outputs(mixer, params, x, Context(positions(), mask))

    causal = outputs(mixer, params, x, Context.packed(positions()))
    np.testing.assert_allclose(of_blocks(np.zeros((1, T))), causal, atol=1e-5, err_msg=why)
    np.testing.assert_allclose(of_blocks(np.ones((1, T))), outputs(mixer, params, x, whole()), atol=1e-5, err_msg=why)
    y = of_blocks(np.arange(T)[None] < 10)
    picture = outputs(mixer, params, x[:, :10], whole(length=10))
    np.testing.assert_allclose(y[:, :10], picture, atol=1e-5, err_msg=why)
    np.testing.assert_allclose(y[:, 10:], causal[:, 10:], atol=1e-5, err_msg=why)
    assert jnp.abs(y[:, :9] - causal[:, :9]).max() > 1e-3, why
