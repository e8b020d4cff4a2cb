"""A technique that fails the contract suite is told what was compared and where to look."""

import flax.linen as nn
import pytest

import contract
from efficientllm.ffns.dense import SwiGLU
from efficientllm.mixers.attention import GQA
from efficientllm.registry import register


@register("ffn", "uncounted")
class Uncounted(SwiGLU):
    """A product with a parameter that is no kernel."""

    @nn.compact
    def __call__(self, x_BTD):
        square_DD = self.param("square", nn.initializers.normal(0.02), (x_BTD.shape[-1],) * 2)
        return super().__call__(x_BTD + x_BTD @ square_DD)


@register("mixer", "larger_than_said")
class LargerThanSaid(GQA, kw_only=True):
    def state_bytes(self, length):
        return super().state_bytes(length) - 8


@pytest.mark.parametrize(
    "check, kind, spec, message",
    [
        (
            contract.check_flops,
            "ffn",
            "uncounted",
            r"ffn uncounted\S*: the program of a row of 160 tokens multiplies [\d,]+ FLOPs, the formulas say [\d,]+: "
            r"\+655,360\. .*mixer/q/kernel [\d,]+.*nothing of .*groups/block_0/ffn/square.*belong into mix_flops.*"
            r"executed_pairs",
        ),
        (
            contract.check_state_bytes,
            "mixer",
            "larger_than_said",
            r"state_bytes\(length\) is not what init_state\(batch, length\) takes a row "
            r"\(float32, all layers, 40 tokens: [\d,]+ bytes by formula, [\d,]+ there are\)",
        ),
    ],
)
def test_what_is_said(check, kind, spec, message):
    with pytest.raises(AssertionError, match=message):
        check(kind, spec)
