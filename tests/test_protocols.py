"""A technique of one's own derives from the base class of its kind, or is refused in one line that names it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import contract
from efficientllm import model, registry
from efficientllm.cost import formulas
from efficientllm.errors import UserError
from efficientllm.ffns.base import FFN
from efficientllm.mixers.base import Mixer

pytestmark = pytest.mark.quick


class PlainMixer(nn.Module):
    @nn.compact
    def __call__(self, x_BTD, ctx, state=None):
        return x_BTD, state


class PlainFFN(nn.Module):
    @nn.compact
    def __call__(self, x_BTD):
        return x_BTD, {}


class NoHooks(Mixer):
    @nn.compact
    def __call__(self, x_BTD, ctx, state=None):
        return x_BTD, state


class Doubled(FFN):
    """Nothing but its call: the rest is the base class's."""

    @nn.compact
    def __call__(self, x_BTD):
        return 2 * x_BTD, {}


@pytest.mark.parametrize(
    ("kind", "module", "base"),
    [("mixer", PlainMixer, "efficientllm.mixers.base.Mixer"), ("ffn", PlainFFN, "efficientllm.ffns.base.FFN")],
)
def test_a_plain_flax_module_is_refused_by_name(kind, module, base, monkeypatch):
    monkeypatch.setitem(registry._REGISTRY, (kind, "plain"), module)
    with pytest.raises(UserError) as refused:
        contract.build(kind, "plain")
    assert str(refused.value) == (
        f"config.model.{kind} = 'plain()': {module.__name__} does not derive from {base}; "
        "derive it, and define what its docstring says"
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda mixer: mixer.init_state(1, 8),
        lambda mixer: mixer.state_bytes(8),
        lambda mixer: mixer.mix_flops(8),
    ],
)
def test_a_mixer_without_a_hook_says_which(call):
    with pytest.raises(NotImplementedError, match=r"^NoHooks defines no (init_state|state_bytes|mix_flops)\("):
        call(NoHooks())


def test_an_ffn_needs_no_more_than_its_call(monkeypatch):
    monkeypatch.setitem(registry._REGISTRY, ("ffn", "doubled"), Doubled)
    lm, plain = contract.build("ffn", "doubled"), contract.build("ffn", "none")
    assert formulas.state_bytes(lm, 8) * 2 == formulas.state_bytes(plain, 8)  # a block without an ffn is half a layer
    ((_, ffn_state),) = jax.eval_shape(lambda: model.init_states(lm, 1, 8))
    assert ffn_state == {}
    params, aux = {"groups": {"block_0": {"ffn": {}}}}, ({},)
    assert model.after_step(lm, params, aux) is params
    logits = contract.logits(lm, contract.tokens())
    assert bool(jnp.all(jnp.isfinite(logits)))
