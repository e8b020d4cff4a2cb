"""The loss as GPUs compute it, with its gradients written out: values and gradients of the plain form in float32."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import contract
from efficientllm import sharding
from efficientllm.objectives import cross_entropy
from efficientllm.runtime import kernel_choice
from efficientllm.train import step
from efficientllm.weights import TransposedKernel, activation_dtype
from objectives.test_cross_entropy import B, V, close, inputs, ours, whole
from tiers import slow_case

pytestmark = pytest.mark.quick
# Of the greatest value. bfloat16 rounds logits to 8 bits and products' operands too.
TOLERANCES = {"float32": (1e-6, 2e-6), "mixed": (2e-3, 2**-6), "bfloat16": (4e-3, 2**-6)}


def limit_chunks(monkeypatch, precision, tokens):
    width = jnp.dtype(activation_dtype(precision)).itemsize
    monkeypatch.setattr(cross_entropy, "GPU_CHUNK_BYTES", width * B * V * tokens)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "precision, T, chunks", [("float32", 23, 3), ("float32", 8, 1), ("mixed", 23, 3), ("bfloat16", 24, 3)]
)
def test_values_and_gradients_of_the_plain_form(monkeypatch, precision, T, chunks, tied):
    limit_chunks(monkeypatch, precision, 8)
    x_BTD, head_DV, batch = inputs(T, activation_dtype(precision))
    value, (dx_BTD, dhead_DV) = jax.value_and_grad(whole, (0, 1))(x_BTD.astype(jnp.float32), head_DV, batch, "float32")
    head = TransposedKernel(jnp.asarray(head_DV.T)) if tied else head_DV
    with kernel_choice.compiling_for("gpu"), kernel_choice.recording_kernels() as used:
        gpu_value, (gpu_dx, gpu_dhead) = jax.jit(
            jax.value_and_grad(functools.partial(ours, precision=precision), (0, 1))
        )(x_BTD, head, batch)
    assert used == {"loss": {"chunked" if chunks > 1 else "whole"}}
    of_value, of_gradient = TOLERANCES[precision]
    close(gpu_value, value, of_value)
    close(gpu_dx, dx_BTD, of_gradient)
    close(gpu_dhead.table.T if tied else gpu_dhead, dhead_DV, of_gradient)
    assert (gpu_dx.dtype, jax.tree.leaves(gpu_dhead)[0].dtype) == (x_BTD.dtype, jnp.float32)


@pytest.mark.parametrize("mesh_spec", ["data=2, fsdp=2, tensor=2", slow_case("fsdp=2, tensor=2, sequence=2")])
def test_eight_devices_equal_the_plain_form(monkeypatch, mesh_spec):
    """Of a vocabulary that is sharded, whose target's logit is found by comparison."""
    limit_chunks(monkeypatch, "float32", 1)
    args = inputs(24)
    value, gradients = jax.value_and_grad(whole, (0, 1))(*args, "float32")
    mesh = sharding.make_mesh(mesh_spec)
    with jax.set_mesh(mesh), kernel_choice.compiling_for("gpu"):
        where = [
            NamedSharding(mesh, sharding.spec(axes, leaf.shape, mesh))
            for axes, leaf in zip((("batch", "length", None), ("embed", "vocab")), args, strict=False)
        ]
        placed = jax.device_put(args, (*where, sharding.batch_sharding(mesh)))
        run = jax.jit(jax.value_and_grad(functools.partial(ours, precision="float32"), (0, 1)))
        gpu_value, gpu_gradients = run(*placed)
    close(gpu_value, value, 1e-6)
    jax.tree.map(lambda a, b: close(a, b, 2e-6), gpu_gradients, gradients)


def test_the_gradient_stores_logits_once_and_their_gradient_once(monkeypatch):
    """No other array of a logit's shape leaves a product or enters one, and the head is rounded outside of the loop."""
    limit_chunks(monkeypatch, "bfloat16", 8)
    with kernel_choice.compiling_for("gpu"):
        traced = jax.make_jaxpr(jax.grad(functools.partial(ours, precision="bfloat16"), (0, 1)))(
            *inputs(24, jnp.bfloat16)
        )
    loop = next(equation for equation in _equations(traced.jaxpr) if equation.primitive.name == "scan")
    body = list(_equations(loop.params["jaxpr"].jaxpr))
    products = [equation for equation in body if equation.primitive.name == "dot_general"]
    assert len(products) == 3
    assert {operand.aval.dtype.name for product in products for operand in product.invars} == {"bfloat16"}
    reductions = [item for item in body if item.primitive.name.startswith("reduce") and V in item.invars[0].aval.shape]
    assert [item.primitive.name for item in reductions] == ["reduce"]
    rounded = [equation.invars[0].aval.shape for equation in body if equation.primitive.name == "convert_element_type"]
    assert rounded and not any(V in shape and len(shape) == 2 for shape in rounded)


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name != "scan":
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from _equations(inner)


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e30])
def test_logsumexp_in_one_pass(scale):
    x = np.random.default_rng(0).standard_normal((5, 301)).astype(np.float32) * np.float32(scale)
    x[0], x[1, 7] = x[0, 0], np.finfo(np.float32).min
    np.testing.assert_allclose(cross_entropy._logsumexp(x), jax.nn.logsumexp(x, -1), rtol=1e-6)
    x[2, 3] = np.nan
    assert np.isnan(cross_entropy._logsumexp(x)).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_objective_that_divides_weights_first_is_the_same(accumulate):
    lm, batch = contract.build("mixer", "gqa"), contract.batch()
    batch["weights"] = (np.random.default_rng(0).random(batch["weights"].shape) < 0.5).astype(np.float32)
    parameters = contract.parameters(lm)

    def gradients():
        grads, metrics = jax.jit(lambda params: step.gradients(lm, params, batch, accumulate))(parameters)
        return grads, metrics["loss"]

    grads, loss = gradients()
    with kernel_choice.compiling_for("gpu"):
        gpu_grads, gpu_loss = gradients()
    np.testing.assert_allclose(gpu_loss, loss, rtol=1e-6)
    jax.tree.map(lambda a, b: close(a, b, 1e-5), gpu_grads, grads)
