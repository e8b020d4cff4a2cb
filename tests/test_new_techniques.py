"""A technique of each kind that is registered from outside is planned, exported or refused, and reported without a word
elsewhere in the package."""

import dataclasses
import typing

import flax.linen as nn
import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import pytest

from configs import base
from convert import folders
from efficientllm import convert, model
from efficientllm.adapters.base import PeftFormat
from efficientllm.adapters.lora import LoRAMethod
from efficientllm.architecture import from_config
from efficientllm.convert import peft, write_quantized
from efficientllm.errors import UserError
from efficientllm.ffns.base import FFN
from efficientllm.layers import Linear
from efficientllm.mixers.attention import GQA
from efficientllm.plan import collectives, serving, training_step
from efficientllm.quant.base import STATIC, Form, Rows
from efficientllm.registry import build, choices, register
from efficientllm.report import rows, techniques
from efficientllm.train import step
from report import made

SIZE = "custom(num_layers=1, dim=48, num_heads=4, num_kv_heads=2, head_dim=8, hidden=72, rope_base=1e4, vocab_size=88)"


@register("mixer", "doubled", choices={"factor": ("two", "three")})
class Doubled(GQA, kw_only=True):
    factor: str = "two"

    def combine(self, y_BTHK, x_BTD):
        return super().combine({"two": 2.0, "three": 3.0}[self.factor] * y_BTHK, x_BTD)


@register("ffn", "tanh")
class Tanh(FFN):
    hidden: int
    precision: str

    @nn.compact
    def __call__(self, x_BTD):
        up_BTF = Linear(self.hidden, ("embed", "mlp"), self.precision, name="up")(x_BTD)
        return Linear(x_BTD.shape[-1], ("mlp", "embed"), self.precision, name="down")(jnp.tanh(up_BTF)), {}


@register("adapter", "small_lora")
@dataclasses.dataclass(frozen=True)
class SmallLoRA(LoRAMethod):
    """PEFT has its function if not its name: LoRA of another scale."""

    @property
    def scale(self):
        return self.alpha / self.rank / 2


@register("adapter", "private_lora")
@dataclasses.dataclass(frozen=True)
class PrivateLoRA(LoRAMethod):
    peft = None


@flax.struct.dataclass
class Signs(Rows):
    """`sign * scale`."""

    values: typing.Any
    scale: typing.Any
    is_table: bool = flax.struct.field(default=False, **STATIC)

    name = "signs"

    def rows(self):
        return self.values.astype(jnp.float32) * self.scale


@register("quant", "signs")
@dataclasses.dataclass(frozen=True)
class SignsForm(Form):
    embedding: str = "bfloat16"

    leaf_type = Signs

    def leaf(self, rows, is_table):
        scale = jnp.mean(jnp.abs(rows), -1, keepdims=True)
        return Signs(jnp.sign(rows).astype(jnp.int8), scale, is_table)


@pytest.fixture
def source(tmp_path):
    folders.llama(tmp_path / "model", hidden_size=64, intermediate_size=96)
    return convert.open_source(tmp_path / "model")


def config(**changes):
    config = base.get_config()
    config.model.size, config.mesh = SIZE, "fsdp=8"
    config.train.batch_size, config.train.length = 16, 26
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize("changes", [{"model.mixer": "doubled"}, {"model.ffn": "tanh"}])
def test_a_layer_is_planned(changes):
    """The closed formula holds for a mixer that sends what attention does, and not for an ffn that does not say."""
    planned = training_step.describe(config(**changes), jax.devices()[:8], "cpu")
    assert (collectives.closed(planned) is None) == ("model.ffn" in changes)


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"model.mixer": "doubled"}, "mixer of layer 0 is 'Doubled'"),
        ({"model.ffn": "tanh"}, "ffn of layer 0 is 'Tanh'"),
    ],
)
def test_a_layer_that_no_family_computes_is_not_exported(changes, problem, source, tmp_path):
    lm = from_config.from_config(config(**changes).model)
    with pytest.raises(UserError, match=problem):
        convert.export(lm, {}, tmp_path / "out", "llama", max_positions=64)


def test_a_text_that_a_field_may_not_be_is_refused():
    assert choices("mixer", "doubled") == {"factor": ("two", "three")}
    with pytest.raises(UserError, match="factor = 'tow' is none of two, three; did you mean 'two'"):
        from_config.from_config(config(**{"model.mixer": "doubled(factor='tow')"}).model)


def tuned(source, spec):
    lm, method = source.lm(), build("adapter", spec)
    return lm, nn.unbox(step.init_state(lm, base.get_config().train, 0, 8, method)()).params


def test_an_adapter_is_exported_as_it_says(source, tmp_path):
    lm, params = tuned(source, "small_lora(rank=2, alpha=8)")
    peft.write(lm, "small_lora(rank=2, alpha=8)", params, tmp_path / "adapter", source)
    assert peft.read_spec(tmp_path / "adapter") == "lora(rank=2, alpha=4.0, dropout=0.0)"


def test_an_adapter_of_no_format_has_no_folder():
    assert not peft.is_writable("private_lora(rank=2)") and PeftFormat("LORA") == build("adapter", "lora").peft


def test_a_form_is_served_in_a_plan_and_written_and_read(source, tmp_path):
    served = config(**{"task": "plan", "plan.of": "infer", "mesh": "data=1", "quant": "signs"})
    assert serving.describe(served, jax.devices()[:1], "cpu").weights > 0
    write_quantized.convert_quantized(source, "signs", tmp_path / "signs")
    again = convert.open_source(tmp_path / "signs")
    lm = again.lm(scan=False)
    stored = again.load_stored(nn.unbox(model.abstract_params(lm)), lm)
    leaves = flax.traverse_util.flatten_dict(stored, sep="/")
    assert isinstance(leaves["group_0/block_0/mixer/q/kernel"], Signs)


def test_techniques_are_reported_by_their_specs(tmp_path):
    row = rows.read_row(made.row(tmp_path / "run", "doubled"))
    assert techniques.techniques(row)["attention"] == "doubled"
