"""The TPU kernel against the plain one, interpreted: values and gradients, on one device and on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficientllm import sharding
from efficientllm.errors import UserError
from efficientllm.ops.attention import Mask, attend, choose
from efficientllm.runtime import kernel_choice
from tiers import slow_case

B, T, H, G, K = 2, 256, 4, 2, 16


def _operands(value_dim=K):
    rng = np.random.default_rng(0)
    shapes = (B, T, H, K), (B, T, G, K), (B, T, G, value_dim)
    segments = jnp.asarray(np.sort(rng.integers(1, 3, (B, T)), axis=1))
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes], segments


def _value_and_gradients(kernel, operands, mask):
    def loss(*operands):
        return jnp.mean(attend(*operands, mask, kernel) ** 2)

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*operands)


@pytest.mark.parametrize("mesh", [None, slow_case("data=2, fsdp=2, tensor=2"), slow_case("data=2, tensor=4")])
@pytest.mark.parametrize("window", [None, slow_case(30)])
def test_splash_is_the_plain_kernel(window, mesh):
    operands, segments = _operands()
    mask = Mask(segments_BT=segments, window=window)
    expected = _value_and_gradients("xla", operands, mask)
    if mesh is None:
        actual = _value_and_gradients("splash", operands, mask)
    else:
        with jax.set_mesh(sharding.make_mesh(mesh)):  # tensor=4 splits query heads and leaves KV heads whole
            actual = _value_and_gradients("splash", operands, mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7, rtol=1e-5), expected, actual)


def test_values_need_not_be_as_wide_as_keys():
    operands, segments = _operands(value_dim=24)
    mask = Mask(segments_BT=segments)
    pair = (_value_and_gradients(kernel, operands, mask) for kernel in ("xla", "splash"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7, rtol=1e-5), *pair)


def test_who_takes_it():
    q = jnp.zeros((1, 256, 2, 64))
    with kernel_choice.compiling_for("tpu"):
        assert choose(q, Mask()) == "splash"
        assert choose(q[:, :200], Mask()) == choose(q, Mask(), bias=lambda *_: 0) == "xla"
        assert choose(q[:, :200], Mask(order="bidirectional")) == "splash"
    assert choose(q, Mask()) != "splash"
    with pytest.raises(UserError, match="no decoding"):
        attend(q, q, q, Mask(), "splash", bias=lambda *_: 0)


def test_splash_honours_segments_of_queries():
    """Padding that reads the text, as in a text encoder."""
    (q, k, v), _ = _operands()
    T = 128
    of_text = jnp.broadcast_to((jnp.arange(T) < 90).astype(jnp.int32), (q.shape[0], T))
    mask = Mask(of_text, query_segments_BT=jnp.ones_like(of_text), order="bidirectional")
    operands = q[:, :T], k[:, :T], v[:, :T]
    pair = (_value_and_gradients(kernel, operands, mask) for kernel in ("xla", "splash"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7, rtol=1e-5), *pair)


@pytest.mark.parametrize("window, across", [(None, False), (30, False), slow_case(None, True)])
def test_splash_honours_the_order_of_rows_that_fill_no_block(window, across):
    """200 tokens; and 200 queries over a text of 140 keys with padding."""
    (q, k, v), segments = _operands()
    T, S = 200, 140 if across else 200
    mask = Mask(segments[:, :T], window=window, order="bidirectional")
    if across:
        mask = Mask.across(segments[:, :T], jnp.where(jnp.arange(S) < 130, segments[:, 60:200], 0))
    operands = q[:, :T], k[:, :S], v[:, :S]
    pair = (_value_and_gradients(kernel, operands, mask) for kernel in ("xla", "splash"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7, rtol=1e-5), *pair)
