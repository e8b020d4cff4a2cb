"""Attention kernels against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from efficientllm.ops import attention
from efficientllm.ops.attention import Mask, attend
from tiers import slow_case


@pytest.mark.parametrize("kernel", ["xla", slow_case("chunked"), "gathered"])
@pytest.mark.parametrize("length", [slow_case(1), slow_case(63), slow_case(64), 130])
def test_attention_kernels_against_plain_numpy(kernel, length, monkeypatch):
    monkeypatch.setattr(attention, "GATHERED_CHUNK", 8)
    rng = np.random.default_rng(length)
    q, k, v = (rng.normal(size=(2, length, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    segments = np.sort(rng.integers(1, 4, (2, length)), axis=1)
    scores = np.einsum("bthk,bshk->bhts", q, np.repeat(k, 2, 2)) / np.sqrt(8)
    visible = np.tril(np.ones((length, length), bool)) & (segments[:, :, None] == segments[:, None, :])
    scores = np.where(visible[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdims=True), np.repeat(v, 2, 2))
    outputs = attend(q, k, v, Mask(segments_BT=jnp.asarray(segments)), kernel)
    np.testing.assert_allclose(outputs, expected, atol=2e-6)
