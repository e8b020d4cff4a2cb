"""Attention in cuDNN is chosen by the GPU that is planned for, and JAX traces it without one."""

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused

from efficientllm.ops import cudnn_attention
from efficientllm.ops.attention import Mask, attend, choose
from efficientllm.plan import cudnn_tracing
from efficientllm.runtime import kernel_choice


def heads(K, G=2):
    return jax.ShapeDtypeStruct((1, 64, G, K), jnp.bfloat16)


@pytest.mark.parametrize(
    "K, capability, kernel", [(128, (8, 0), "cudnn"), (192, (8, 0), "xla"), (192, (9, 0), "cudnn")]
)
def test_how_wide_heads_may_be_depends_on_the_gpu(K, capability, kernel):
    with kernel_choice.compiling_for("gpu", capability):
        assert choose(heads(K), Mask()) == kernel
        assert kernel_choice.capability() == capability
    assert kernel_choice.capability() == (0, 0)  # this machine has no GPU


def test_wide_heads_are_traced_for_a_gpu_that_takes_them():
    def loss(q, k, v):
        return attend(q, k, v, Mask(), "cudnn").astype(jnp.float32).sum()

    shapes = heads(192), heads(192), heads(128)
    with cudnn_tracing.planned_for((8, 0)), pytest.raises(NotImplementedError, match="head dim must be <= 128"):
        jax.eval_shape(jax.grad(loss), *shapes)
    with kernel_choice.compiling_for("gpu", (9, 0)), cudnn_tracing.planned_for((9, 0)):
        assert jax.eval_shape(jax.grad(loss), *shapes).shape == (1, 64, 2, 192)


@pytest.mark.parametrize(
    "mask, masked, causal",
    [
        (Mask(), False, True),
        (Mask(order="bidirectional"), False, False),
        (Mask(order="bidirectional", window=9), True, False),
        (Mask(jnp.ones((1, 64), jnp.int32), order="bidirectional"), True, False),
        (Mask(order="prefix", blocks_BT=jnp.ones((1, 64), jnp.int32)), True, False),
    ],
)
def test_every_order_is_traced(mask, masked, causal):
    """Causal by itself; in both directions without a mask, or with a dense one."""
    q = heads(64)
    with kernel_choice.compiling_for("gpu", (9, 0)), cudnn_tracing.planned_for((9, 0)):
        assert choose(q, mask) == "cudnn" and choose(q, Mask.across(), keys=77) == "xla"
        traced = str(jax.make_jaxpr(lambda q: attend(q, q, q, mask))(q))
    assert ("mask_type=MaskType.CAUSAL" in traced) == causal and ("bool[1,1,64,64]" in traced) == masked, traced


def test_a_mask_has_no_gradient():
    mask = Mask(jnp.ones((1, 64), jnp.int32))

    def loss(q):
        return attend(q, q, q, mask).astype(jnp.float32).sum()

    export = getattr(fused, "should_export_dbias", None)  # of JAX 0.10, where masks are numbers to add
    with kernel_choice.compiling_for("gpu", (9, 0)), cudnn_tracing.planned_for((9, 0)):
        traced = str(jax.make_jaxpr(jax.grad(loss))(heads(64)))
    assert "variadic_args=(True, False)" in traced and "variadic_args=(True, True)" not in traced, traced
    assert getattr(fused, "should_export_dbias", None) is export
    with cudnn_tracing.planned_for((9, 0)):  # JAX's own number for what is masked
        for dtype, number in cudnn_attention.MASKED.items():
            assert fused.get_large_negative_number(dtype) == number


def test_afterwards_the_process_is_asked_again():
    checks = fused.check_compute_capability, fused.is_cuda_compute_capability_equal, fused.check_cudnn_version
    with pytest.raises(ValueError, match="inside"), cudnn_tracing.planned_for((9, 0)):
        assert fused.check_compute_capability("9.0") and not fused.check_compute_capability("10.0")
        assert fused.check_cudnn_version() == 91000
        raise ValueError("inside")
    assert checks == (
        fused.check_compute_capability,
        fused.is_cuda_compute_capability_equal,
        fused.check_cudnn_version,
    )
