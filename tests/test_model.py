"""The language model: scanned and unrolled layers, patterns of blocks, untied embeddings."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import contract
from efficientllm.errors import UserError
from efficientllm.ops.attention import Context


@pytest.mark.slow
def test_layers_compiled_one_after_another_are_the_same_function():
    lm, unrolled = (contract.build("mixer", "gqa", unroll=most) for most in (0, 12))
    run = lambda lm: jax.jit(lambda p: contract.loss_and_gradients(lm, p))  # noqa: E731
    loop, text = run(lm)(contract.parameters(lm)), run(lm).lower(contract.parameters(lm)).as_text()
    apart, apart_text = run(unrolled)(contract.parameters(lm)), run(unrolled).lower(contract.parameters(lm)).as_text()
    assert "while" in text and "while" not in apart_text
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), loop, apart)


def test_untied_embeddings_and_a_hybrid_pattern():
    lm = contract.build("mixer", "gqa", tied=False, pattern=("mha", "mqa | gelu"))
    tokens = jnp.zeros((1, 8), jnp.int32)
    boxed = jax.eval_shape(lambda: lm.init(jax.random.key(0), tokens, Context.packed(tokens)))["params"]
    params = nn.unbox(boxed)
    assert params["head"]["kernel"].shape == (32, contract.VOCAB)
    assert params["groups"]["block_1"]["ffn"].keys() == {"up", "down"}
    with pytest.raises(UserError, match="layers do not divide the 2 layers"):
        contract.build("mixer", "gqa", pattern=("mha", "mqa", "gqa"))
