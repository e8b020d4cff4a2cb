"""Norms against torch."""

import jax
import numpy as np
import pytest

from efficientllm.registry import build

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.quick
X = 5 + 3 * np.random.default_rng(0).standard_normal((4, 24), np.float32)


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_layer_norm_without_parameters(eps):
    norm = build("norm", f"layernorm(eps={eps}, affine=False)")
    assert norm.init(jax.random.key(0), X) == {}
    expected = torch.nn.functional.layer_norm(torch.from_numpy(X), (24,), eps=eps).numpy()
    np.testing.assert_allclose(norm.apply({}, X), expected, rtol=1e-5, atol=1e-6)


def test_layer_norm_with_parameters():
    scale, bias = np.random.default_rng(1).standard_normal((2, 24), np.float32)
    ours = build("norm", "layernorm(eps=1e-5)").apply({"params": {"scale": scale, "bias": bias}}, X)
    theirs = torch.nn.functional.layer_norm(
        torch.from_numpy(X), (24,), torch.from_numpy(scale), torch.from_numpy(bias), 1e-5
    )
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-5)


def test_rms_norm():
    scale = np.random.default_rng(1).standard_normal(24, np.float32)
    ours = build("norm", "rmsnorm(eps=1e-6)").apply({"params": {"scale": scale}}, X)
    theirs = torch.nn.functional.rms_norm(torch.from_numpy(X), (24,), torch.from_numpy(scale), 1e-6)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-6)
