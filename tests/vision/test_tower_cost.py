"""What a tower's attention costs: windows cost what their windows do, and full layers hold no scores of all pairs."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import hlo
from convert.hf_config.test_vision_language import PUBLISHED
from efficientllm import model
from efficientllm.architecture import from_config
from efficientllm.convert.hf_config import families
from efficientllm.cost.jaxpr_flops import count_program_flops
from efficientllm.embeds.vision_language import encode_images
from efficientllm.embeds.vision_tower import PatchArrays
from efficientllm.ops.native import flash

HEADS, BIN = 16, 64  # of Qwen2.5-VL


@pytest.fixture(autouse=True)
def _xla_computes(monkeypatch):
    """The native kernel's scores are in no jaxpr."""
    monkeypatch.setattr(flash, "is_usable", lambda: False)


def tower(layers, **changes):
    """The language model of Qwen2.5-VL-7B with a tower whose `layers`, by number, are full: one period is traced."""
    config = PUBLISHED["qwen2.5-vl-7b"][0]
    vision = config["vision_config"] | {"depth": 2, "fullatt_block_indexes": layers}
    described = families.describe_config(config | {"num_hidden_layers": 1, "vision_config": vision}, "config.json")
    return from_config.from_config(from_config.complete_model(described.model | changes))


def program(lm, slots, gradients=False):
    """The jaxpr of the features of a row of `slots` patches, or of the gradients of their sum of squares."""
    integers = jax.ShapeDtypeStruct((1, slots), jnp.int32)
    pixels = jax.ShapeDtypeStruct((1, slots, lm.vision.pixel_features), jnp.float32)
    patches = PatchArrays(pixels, integers, jax.ShapeDtypeStruct((1, slots, 2), jnp.int32), integers, integers)
    patches = patches if lm.vision.bin else patches._replace(windows_BS=None)

    def features(params, patches):
        return encode_images(lm, params, patches)

    def loss(params, patches):
        return jnp.sum(features(params, patches) ** 2)

    params = nn.unbox(model.abstract_params(lm))
    return jax.make_jaxpr(jax.grad(loss) if gradients else features)(params, patches)


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
def test_layers_of_windows_cost_what_their_windows_cost(gradients):
    """Twice the patches are twice the FLOPs, and no scores are of more than a bin: 8 x 8 patches."""
    lm = tower([])
    flops = [count_program_flops(program(lm, slots, gradients)) for slots in (2048, 4096)]
    assert flops[1] == 2 * flops[0]
    shapes = set(hlo.array_shapes(program(lm, 4096, gradients).jaxpr))
    assert any(shape[-1:] == (BIN,) and math.prod(shape) == 4096 * HEADS * BIN for shape in shapes)
    assert not any(shape.count(4096) > 1 for shape in shapes)


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("slots", [2048, 5184])
def test_full_layers_never_hold_the_scores_of_all_pairs(slots, gradients):
    """Of 2,048 patches, and of the 5,184 of a picture of 1000 x 1000, whose scores would be 1.7 GB in a layer."""
    jaxpr = program(tower([0, 1]), slots, gradients).jaxpr
    shapes = {shape for shape in hlo.array_shapes(jaxpr) if slots in shape}
    assert any(shape[-1] == slots and HEADS in shape for shape in shapes)  # scores of some queries
    assert not any(shape.count(slots) > 1 for shape in shapes)
    assert max(map(math.prod, shapes)) < HEADS * slots**2 / 4


def test_the_scores_of_all_pairs_would_be_seen():
    """The kernel that holds them, in a shorter row: what the tests above look for is there."""
    lm = tower([0, 1], attention_kernel="xla")
    assert any(shape.count(1024) > 1 and HEADS in shape for shape in hlo.array_shapes(program(lm, 1024).jaxpr))
