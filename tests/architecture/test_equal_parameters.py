"""Equal parameter counts: another mixer at the width that matches a reference block within 2 %."""

import functools

import flax.linen as nn
import jax
import pytest

from configs import base
from efficientllm import model
from efficientllm.architecture import from_config
from efficientllm.errors import UserError
from efficientllm.registry import parse_spec
from tiers import slow_case

REFERENCE = "gqa | swiglu"
VOCAB = 2048


def build(size, mixer, reference="", **changes):
    config = base.get_config().model
    config.unroll = 0
    config.update({"size": size, "mixer": mixer, "parameters_of": reference, **changes})
    return from_config.from_config(config, VOCAB)


@functools.cache
def parameters(lm):
    return sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(model.abstract_params(lm))))


def hidden(lm):
    """The width of the ffn."""
    return parse_spec(lm.blocks[0][1])[1]["hidden"]


@pytest.mark.parametrize("size", ["tiny", slow_case("small")])
@pytest.mark.parametrize("mixer", [slow_case("mha"), slow_case("mqa"), "mla", "window(window=32)"])
def test_as_many_parameters_as_the_reference(size, mixer):
    wanted = parameters(build(size, "gqa"))
    lm = build(size, mixer, REFERENCE)
    assert parameters(lm) == pytest.approx(wanted, rel=0.02)
    unmatched = build(size, mixer)
    if parameters(unmatched) == wanted:
        assert lm == unmatched
    else:  # what the mixer saves goes to the ffn, what it costs is taken from there; in multiples of 8
        assert (hidden(lm) > hidden(unmatched)) == (parameters(unmatched) < wanted)
        assert abs(parameters(lm) - wanted) < abs(parameters(unmatched) - wanted)
        assert hidden(lm) % 8 == 0
    assert (
        lm.num_layers == unmatched.num_layers and lm.dim == unmatched.dim and lm.blocks[0][0] == unmatched.blocks[0][0]
    )


@pytest.mark.slow
def test_the_reference_takes_its_own_ffn_and_no_pattern():
    """Widths count for the whole pattern; the reference is one block of the named mixer, repeated."""
    wanted = parameters(build("tiny", "gqa", ffn="gelu"))
    lm = build("tiny", "gqa", "gqa | gelu", pattern=("mqa", "mha"))
    assert parameters(lm) == pytest.approx(wanted, rel=0.02)
    assert parameters(build("tiny", "mqa", "gqa", ffn="gelu")) == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize(
    "mixer, ffn",
    [("mla(kv_rank=4096)", "swiglu"), ("mha", "none"), ("mha", "swiglu(hidden=384)")],
    ids=["too-many", "no-ffn", "a-fixed-width"],
)
def test_unreachable_is_one_line(mixer, ffn):
    with pytest.raises(UserError) as refused:
        build("tiny", mixer, "gqa | swiglu", ffn=ffn)
    message, wanted = str(refused.value), parameters(build("tiny", "gqa"))
    assert message == (
        f"config.model.parameters_of = 'gqa | swiglu': no width gives this model {wanted:,} parameters; "
        "set it to '' to keep the widths of the size"
    )


@pytest.mark.parametrize(
    "reference, message",
    [
        ("gqx", "config.model.parameters_of = 'gqx': no mixer of that name"),
        ("gqa | swigluu", "config.model.parameters_of = 'swigluu': no ffn of that name"),
        ("gqa(heads=3)", "config.model.parameters_of = 'gqa(heads=3)': mixer 'gqa' has no field 'heads'"),
    ],
)
def test_a_bad_reference_is_named(reference, message):
    with pytest.raises(UserError) as refused:
        build("tiny", "mha", reference)
    assert str(refused.value).startswith(message)
