"""Positions that a model or a length cannot have are refused in one line."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import contract
import runs
from efficientllm import main, model, registry
from efficientllm.errors import UserError
from efficientllm.infer.engine import Engine
from efficientllm.infer.samplers import Greedy
from efficientllm.mixers.base import Mixer
from efficientllm.ops import patches
from efficientllm.ops.attention import Context
from efficientllm.registry import build
from tiers import slow_case

LEARNED = "learned(max_length=16)"


class OfEmbeddings(Mixer):
    """A mixer that has no heads to turn and no scores to add to."""

    position: str
    admits = ("embedding",)

    @nn.compact
    def __call__(self, x_BTD, ctx, state=None):
        return x_BTD, state


@pytest.fixture
def of_embeddings(monkeypatch):
    monkeypatch.setitem(registry._REGISTRY, ("mixer", "of_embeddings"), OfEmbeddings)


@pytest.mark.parametrize(
    "position, acts_on", [("alibi", "scores"), ("t5", "scores"), ("relative", "scores"), ("rope", "heads")]
)
def test_a_mixer_refuses_what_it_cannot_use(of_embeddings, position, acts_on):
    with pytest.raises(UserError) as refused:
        contract.build("mixer", "of_embeddings", position=position)
    message = str(refused.value)
    assert message.startswith(f"config.model.position = '{position}(") and "\n" not in message
    assert message.endswith(
        f": acts on the {acts_on}; mixer 'of_embeddings' admits positions that act on the embedding"
    )


@pytest.mark.parametrize("position", ["learned(max_length=256)", "sinusoidal", "none"])
def test_a_mixer_takes_what_it_admits(of_embeddings, position):
    contract.build("mixer", "of_embeddings", position=position)


def test_a_position_of_the_embeddings_is_the_whole_model_s():
    with pytest.raises(
        UserError, match="a position of the embeddings belongs to the whole model; set config.model.position"
    ):
        contract.build("mixer", "gqa(position='sinusoidal')", position="rope")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            {"model__position": LEARNED},
            "config.train.length = 32: 32 tokens, but the position 'learned(max_length=16)' has 16 "
            "positions; give it 32, or take 16 tokens at most",
        ),
        (
            {"model__position": "learned(max_length=40)", "sample__prompt": "A prompt", "sample__tokens": 50},
            "config.sample.tokens = 50 after a prompt of 8: 58 tokens, but the position "
            "'learned(max_length=40)' has 40 positions; give it 58, or take 40 tokens at most",
        ),
    ],
    ids=["training", "sampling"],
)
def test_a_run_longer_than_the_learned_table(tmp_path, capsys, overrides, message):
    argv = runs.arguments(runs.corpus(tmp_path / "text"), tmp_path / "run", **overrides, mesh="data=8")
    assert main.main(argv) == 2
    assert f"efficientllm: {message}\n" == capsys.readouterr().err.splitlines(keepends=True)[-1]


def test_generating_beyond_the_learned_table():
    lm = contract.build("position", LEARNED)
    with pytest.raises(UserError) as refused:
        Engine(lm, {}, Greedy(), -1, 17)
    assert str(refused.value) == (
        "prompts and answers of 17 tokens: 17 tokens, but the position 'learned(max_length=16)' has 16 "
        "positions; give it 17, or take 16 tokens at most"
    )
    model.init_states(lm, 1, 16)
    with pytest.raises(UserError, match="a state: 17 tokens, but the position"):
        model.init_states(lm, 1, 17)


@pytest.mark.parametrize(
    "position, message",
    [
        ("t5(num_buckets=8, max_distance=4)", "t5: max_distance = 4 must be above num_buckets / 2 = 4"),
        ("rope(scaling='dynamic(factor=2.0, original_length=8)', base=1e4, fraction=0.5)", "it needs 4 or more"),
        (
            "rope(base=1e4, scaling='llama3(factor=2.0, original_length=8, low_freq_factor=4.0)')",
            "high_freq_factor = 4.0 must be above low_freq_factor = 4.0",
        ),
    ],
)
def test_numbers_that_do_not_go_together(position, message):
    x_BTHK = jnp.ones((1, 3, 2, 4))
    with pytest.raises(UserError) as error:
        build("position", position).rotate(x_BTHK, jnp.arange(3)[None])
    assert message in str(error.value)


def rotation(spec):
    return build("position", f"rope(base=100.0{spec})", parent=None)


X_BTHK = np.random.default_rng(0).standard_normal((2, 5, 3, 8), np.float32)
COORDINATES_BTA = np.random.default_rng(1).integers(0, 50, (2, 5, 3))


@pytest.mark.parametrize("spec", ["", ", interleaved=True", ", scaling='linear(factor=3.0)'"])
def test_a_token_with_one_position_on_all_axes_rotates_as_by_one_axis(spec):
    positions_BT = COORDINATES_BTA[..., 0]
    expected = rotation(spec).rotate(X_BTHK, positions_BT)
    sectioned = rotation(spec + ", sections=(1, 2, 1)")
    assert (rotation(spec).axes, sectioned.axes) == (1, 3)
    np.testing.assert_array_equal(sectioned.rotate(X_BTHK, positions_BT), expected)
    same_BTA = np.broadcast_to(positions_BT[..., None], (2, 5, 3))
    np.testing.assert_array_equal(sectioned.rotate(X_BTHK, same_BTA), expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_restarted_sections_are_rotations_of_their_own(interleaved):
    """Each section of interleaved pairs is a head of its own; of halves, the two runs of its features."""
    position = rotation(f", sections=(1, 2, 1), restart=True, interleaved={interleaved}")
    alone = rotation(f", interleaved={interleaved}")
    rotated = position.rotate(X_BTHK, COORDINATES_BTA)
    for axis, pairs in enumerate([(0,), (1, 2), (3,)]):
        firsts = [2 * pair for pair in pairs] if interleaved else pairs
        features = [first + (1 if interleaved else 4) * second for second in (0, 1) for first in firsts]
        features = sorted(features) if interleaved else features
        expected = alone.rotate(X_BTHK[..., features], COORDINATES_BTA[..., axis])
        np.testing.assert_array_equal(rotated[..., features], expected)


@pytest.mark.parametrize(
    "spec, message",
    [
        (", sections=(1, 1)", "position: sections = (1, 1) are 2 pairs; 4 pairs of a head rotate"),
        (", sections=(2, 2)", "position: sections = (2, 2) are of 2 axes; tokens have 3"),
        (", sections=(1, 2, 1), scaling='dynamic(factor=2.0, original_length=8)'", "depends on the length of a row"),
        (", sections=(2, 2), table=64", "position: sections = (2, 2) are of 2 axes; tokens have 3"),
        (", table=64, scaling='linear(factor=3.0)'", "position: table = 64 does not go with scaling = 'linear(factor"),
    ],
)
def test_sections_that_do_not_go(spec, message):
    with pytest.raises(UserError) as refused:
        rotation(spec).rotate(X_BTHK, COORDINATES_BTA)
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "spec", ["", ", interleaved=True", ", sections=(1, 2, 1)", ", sections=(1, 2, 1), restart=True"]
)
def test_a_table_has_the_rotations_of_its_positions(spec):
    coordinates = COORDINATES_BTA if "sections" in spec else COORDINATES_BTA[..., 0]
    expected = rotation(spec).rotate(X_BTHK, coordinates)
    position = rotation(spec + ", table=50")
    # Angles up to 49 are rounded twice in float32, with their frequencies.
    error = 2 * 49 * 6e-8 * np.abs(X_BTHK).max() * 2**0.5 + 1e-6
    np.testing.assert_allclose(position.rotate(X_BTHK, coordinates), expected, rtol=0, atol=error)
    same = position.rotate(X_BTHK, COORDINATES_BTA[..., 0])
    np.testing.assert_allclose(same, rotation(spec).rotate(X_BTHK, COORDINATES_BTA[..., 0]), rtol=0, atol=error)


def test_positions_beyond_a_table_are_refused_or_not_a_number():
    position = rotation(", sections=(1, 2, 1), table=49")
    with pytest.raises(UserError, match="position: table = 49: a token is at 49; give it at least 50"):
        position.check_coordinates(COORDINATES_BTA[0] * 0 + [48, 49, 3])
    position.check_coordinates(COORDINATES_BTA[0] * 0 + [48, 48, 3])
    rotated = position.rotate(X_BTHK, COORDINATES_BTA * 0 + [48, 49, 3])
    assert np.isnan(rotated).any((0, 1, 2)).tolist() == [False, True, True, False] * 2
    assert position.max_positions is None and rotation(", table=49").max_positions == 49


@pytest.mark.parametrize("sections", [(0, 4), (1.5, 2.5), ("1", 3), (True, 3)])
def test_sections_are_whole_numbers(sections):
    with pytest.raises(UserError, match="sections = .*: must be a tuple of numbers, each at least 1"):
        rotation(f", sections={sections}")


def test_fixed_positions_of_coordinates_are_a_constant_of_the_host():
    position, x_BTD = build("position", "sincos2d(scale=0.5)", parent=None), jnp.ones((2, 6, 8))
    table_TD = patches.sincos_2d((2, 3), 8, 0.5)
    np.testing.assert_array_equal(
        position.embed(x_BTD, patches.coordinates((2, 3))[None]), 1 + jnp.stack([table_TD] * 2)
    )
    traced = jax.make_jaxpr(lambda x: position.embed(x, patches.coordinates((2, 3))[None]))(x_BTD)
    assert "sin" not in str(traced)
    diagonal = position.embed(x_BTD, jnp.array([[0, 1, 2, 3, 4, 5]]))
    np.testing.assert_allclose(diagonal[0], 1 + patches.sincos_2d((6, 6), 8, 0.5)[::7], rtol=0, atol=1e-6)


@pytest.mark.parametrize("mixer", ["gqa", "moba", slow_case("nsa")])
def test_mixers_rotate_by_coordinates(mixer):
    """The same coordinate on all axes is a position; others give other outputs."""
    plain = contract.build("mixer", mixer, position="rope(base=100.0)")
    sectioned = contract.build("mixer", mixer, position="rope(base=100.0, sections=(1, 3))")
    ids, ctx = contract.tokens(), Context.packed(contract.positions())
    coordinates_BTA = np.stack([contract.positions()] * 2, -1)
    same, other = (ctx.replace(coordinates_BTA=c) for c in (coordinates_BTA, coordinates_BTA // [1, 5]))
    expected = contract.logits(plain, ids, ctx=ctx)
    np.testing.assert_allclose(contract.logits(sectioned, ids, ctx=same), expected, rtol=0, atol=1e-6)
    assert np.abs(contract.logits(sectioned, ids, ctx=other) - expected).max() > 1e-3
