"""Positions that a model or a length cannot have are refused in one line."""

import flax.linen as nn
import jax.numpy as jnp
import pytest

import contract
import runs
from efficientllm import main, model, registry
from efficientllm.errors import UserError
from efficientllm.infer.engine import Engine
from efficientllm.infer.samplers import Greedy
from efficientllm.mixers.base import Mixer
from efficientllm.registry import build

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
            "config.train.length = 32: 32 tokens, but config.model.position = 'learned(max_length=16)' has 16 "
            "positions; give it 32, or take 16 tokens at most",
        ),
        (
            {"model__position": "learned(max_length=40)", "sample__prompt": "A prompt", "sample__tokens": 50},
            "config.sample.tokens = 50 after a prompt of 8: 58 tokens, but config.model.position = "
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
        "prompts and answers of 17 tokens: 17 tokens, but config.model.position = 'learned(max_length=16)' has 16 "
        "positions; give it 17, or take 16 tokens at most"
    )
    model.init_states(lm, 1, 16)
    with pytest.raises(UserError, match="a state: 17 tokens, but config.model.position"):
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
