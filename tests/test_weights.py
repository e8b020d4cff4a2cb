"""Matrix products and their gradients under every precision, as a model uses them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficientllm.weights import matmul

pytestmark = pytest.mark.quick

TOLERANCE = {"float32": 1e-6, "mixed": 1e-2, "bfloat16": 2e-2}  # relative, in the Frobenius norm


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("tied", [False, True])
def test_product_and_gradients(precision, tied):
    """Against float64. A tied head has a transposed kernel, whose gradient XLA folds into the product."""
    random = np.random.default_rng(0)
    x, w, dy = (random.standard_normal(shape) for shape in ((2, 24, 16), (16, 40), (2, 24, 40)))
    low = jnp.bfloat16 if precision == "bfloat16" else jnp.float32

    def product(x, kernel):
        return jnp.vdot(matmul(x, kernel.T if tied else kernel, precision), jnp.asarray(dy, low)).astype(jnp.float32)

    kernel = w.T if tied else w
    y = jax.jit(lambda x, w: matmul(x, w, precision))(jnp.asarray(x, low), jnp.asarray(w, jnp.float32))
    grads = jax.jit(jax.grad(product, (0, 1)))(jnp.asarray(x, low), jnp.asarray(kernel, jnp.float32))
    dw = np.einsum("bti,bto->io", x, dy)
    for actual, exact in ((y, x @ w), (grads[0], dy @ w.T), (grads[1], dw.T if tied else dw)):
        error = np.linalg.norm(np.asarray(actual, np.float64) - exact) / np.linalg.norm(exact)
        assert error < TOLERANCE[precision], error
    assert y.dtype == grads[0].dtype == low and grads[1].dtype == jnp.float32


def test_mixed_rounds_both_passes():
    """A value that bfloat16 cannot hold is rounded in the product, and the cotangent in its gradients."""
    fine = jnp.array([[1.0 + 2.0**-10]])  # bfloat16 has 8 bits of precision
    ones = jnp.ones((1, 1))
    y, pull = jax.vjp(lambda x, w: matmul(x, w, "mixed"), fine, ones)
    dx, dw = pull(fine)
    assert y == 1.0 and dx == 1.0 and dw == 1.0
    assert matmul(fine, ones, "float32") == fine


def test_mixed_products_round_their_operands_and_nothing_else():
    rng = np.random.default_rng(0)
    x, w, dy = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 5, 16), (16, 8), (3, 5, 8)))

    def low(a):
        return np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32)

    y, back = jax.vjp(lambda x, w: matmul(x, w, "mixed"), x, w)
    dx, dw = back(jnp.asarray(dy))
    assert y.dtype == dx.dtype == dw.dtype == jnp.float32
    np.testing.assert_allclose(y, low(x) @ low(w), atol=1e-5)
    np.testing.assert_allclose(dx, low(dy) @ low(w).T, atol=1e-5)
    np.testing.assert_allclose(dw, np.einsum("btd,btf->df", low(x), low(dy)), atol=1e-5)
