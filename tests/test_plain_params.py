"""Parameters that a module of one's own makes by a plain `self.param`: whole on every device, and like all others."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import contract
import runs
from efficientllm import main, model, sharding
from efficientllm.cost import formulas
from efficientllm.errors import UserError
from efficientllm.ffns.dense import SwiGLU
from efficientllm.registry import register
from tiers import slow_case

PLUGIN = """
import flax.linen as nn
from efficientllm.ffns.dense import SwiGLU
from efficientllm.registry import register

@register("ffn", "NAME")
class Shifted(SwiGLU):
    @nn.compact
    def __call__(self, x_BTD):
        shift_D = self.param("shift", nn.initializers.zeros, (x_BTD.shape[-1],))
        return super().__call__(x_BTD + shift_D)
"""


@register("ffn", "plainly_shifted")
class Shifted(SwiGLU):
    """swiglu of x + shift. `axes` of the shift: none, flax's own box, or more than it has dimensions."""

    axes: str = ""

    @nn.compact
    def __call__(self, x_BTD):
        init = nn.initializers.normal(0.1)
        if self.axes == "partitioned":
            init = nn.with_partitioning(init, ("embed",))
        if self.axes == "wrong":
            init = nn.with_logical_partitioning(init, ("embed", "mlp"))
        shift_D = self.param("shift", init, (x_BTD.shape[-1],))
        return super().__call__(x_BTD + shift_D.astype(x_BTD.dtype))


@pytest.mark.parametrize("axes", ["", "partitioned"])
def test_they_are_counted_sharded_and_learnt(axes):
    lm = contract.build("ffn", f"plainly_shifted(axes={axes!r})")
    plain = contract.build("ffn", "swiglu")
    boxed = model.abstract_params(lm)
    counts = [
        formulas.count_parameters(model_form, model.abstract_params(model_form))["total"] for model_form in (lm, plain)
    ]
    assert counts[0] == counts[1] + 2 * lm.dim
    mesh = sharding.make_mesh("fsdp=8")
    where = sharding.shardings(boxed, mesh)["groups"]["block_0"]["ffn"]["shift"]
    assert where.is_fully_replicated == (axes == "")
    grads = jax.jit(functools.partial(contract.loss_and_gradients, lm))(contract.parameters(lm))[1]
    assert jnp.abs(grads["groups"]["block_0"]["ffn"]["shift"]).min() > 0
    again = model.init_params(lm, jax.random.key(0), 8)
    assert jax.tree.structure(boxed) == jax.tree.structure(again)


def test_axes_that_are_not_the_dimensions_are_named():
    lm = contract.build("ffn", "plainly_shifted(axes='wrong')")
    with pytest.raises(UserError, match="parameter groups/block_0/ffn/shift of shape .*: 3 logical axes are named"):
        model.abstract_params(lm)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, overrides",
    [("one", {}), slow_case("two", {"adapter": "lora(rank=2)", "quant": "int4()"})],
)
def test_a_run_ends_with_its_row(tmp_path, name, overrides):
    (tmp_path / "own.py").write_text(PLUGIN.replace("NAME", name))
    values = {"imports": f"('{tmp_path}/own.py',)", "model.ffn": name, "train.steps": 2}
    argv = runs.arguments(runs.corpus(tmp_path / "corpus"), tmp_path / "run", **values, **overrides)
    assert main.main(argv) == 0 and (tmp_path / "run" / "record.json").exists()
    assert np.isfinite(list(map(len, runs.losses(tmp_path / "run").values()))).all()
