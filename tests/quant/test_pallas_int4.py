"""The kernels for NVIDIA and TPU, interpreted, against the decompressed product; and what compilers see of them."""

import functools
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding

from efficientllm import sharding
from efficientllm.ops.grouped_matmul import grouped_matmul
from efficientllm.quant import matmul as products
from efficientllm.quant import pallas_int4
from efficientllm.quant.int4 import Int4, Int4Form
from efficientllm.runtime import kernel_choice
from efficientllm.weights import matmul, matmul_together

pytestmark = pytest.mark.quick

# rows of x, rows of the weights, their width, group: tiles that divide them and that do not
SIZES = [
    (1, 64, 64, 32),
    (3, 200, 576, 32),
    (17, 37, 99, 64),
    (130, 130, 1024, 128),
    (16, 16, 2080, 32),
    (2, 40, 2336, 64),
]


def leaf(form, rows, width, group):
    """Random bits, an input factor too where the form is AWQ's."""
    rng, groups = np.random.default_rng(width), -(-width // group)
    values = jnp.asarray(rng.integers(0, 256, (rows, groups * group // 2), np.uint8))
    scale = jnp.asarray(rng.random((rows, groups)) ** 4, jnp.float16)
    zero = jnp.asarray(rng.integers(0, 16, (rows, groups)), jnp.uint8) if form == "zero" else None
    minimum = jnp.asarray(rng.standard_normal((rows, groups)), jnp.float16) if form == "minimum" else None
    x_scale = jnp.asarray(rng.random((1, width)) + 0.5, jnp.float16) if form == "awq" else None
    return Int4(values, scale, zero, minimum, x_scale, width)


def interpreted(platform):
    """Whether what is of `platform` must be interpreted here."""
    return platform != jax.default_backend()


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("form", ["symmetric", "zero", "minimum", "awq"])
@pytest.mark.parametrize("rows, outputs, width, group", SIZES)
def test_it_is_the_decompressed_product(platform, form, rows, outputs, width, group):
    kernel = leaf(form, outputs, width, group)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, width)), jnp.float32)
    product = pallas_int4.product(x, kernel, jnp.float32, platform, interpret=interpreted(platform))
    exact = np.asarray(x, np.float64) @ np.asarray(kernel.rows(), np.float64).T
    bound = 2e-6 * np.linalg.norm(x, axis=-1)[:, None] * np.linalg.norm(kernel.rows(), axis=-1)
    assert product.dtype == jnp.float32 and (np.abs(product - exact) <= bound).all()


@pytest.mark.parametrize("platform, rows, both", [("gpu", 16, True), ("gpu", 3, False), ("tpu", 3, True)])
def test_operands_are_rounded_to_bfloat16(platform, rows, both):
    """Of vectors only x is: no tensor core multiplies the weights."""
    kernel = leaf("symmetric", 64, 256, 32)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, 256)), jnp.float32)
    product = pallas_int4.product(x, kernel, jnp.bfloat16, platform, interpret=interpreted(platform))
    weights = kernel.rows().astype(jnp.bfloat16) if both else kernel.rows()
    x, weights = (np.asarray(operand, np.float64) for operand in (x.astype(jnp.bfloat16), weights))
    np.testing.assert_allclose(product, x @ weights.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("form", ["symmetric", "zero", "minimum"])
@pytest.mark.parametrize("rows, width, parts", [(1, 576, 1), (3, 99, 1), (2, 2336, 2), (40, 576, 4), (130, 99, 1)])
def test_kernels_of_one_input_are_multiplied_together(form, rows, width, parts, monkeypatch):
    rule = pallas_int4.tile
    monkeypatch.setattr(pallas_int4, "tile", lambda *sizes: rule(*sizes)._replace(parts=parts))
    leaves = [leaf(form, outputs, width, 32) for outputs in (200, 40, 37)]
    x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, width)), jnp.float32)
    assert pallas_int4.joins(leaves, "gpu")
    products = pallas_int4.products(x, leaves, jnp.float32, "gpu", interpret=interpreted("gpu"))
    for kernel, y in zip(leaves, products, strict=True):
        exact = np.asarray(x, np.float64) @ np.asarray(kernel.rows(), np.float64).T
        bound = 2e-6 * np.linalg.norm(x, axis=-1)[:, None] * np.linalg.norm(kernel.rows(), axis=-1)
        assert y.shape == exact.shape and (np.abs(y - exact) <= bound).all()


def test_what_one_kernel_cannot_multiply_together():
    symmetric, zero = (leaf(form, 64, 128, 32) for form in ("symmetric", "zero"))
    alike, other = leaf("symmetric", 96, 128, 32), [leaf("awq", 64, 128, 32), leaf("symmetric", 64, 128, 64)]
    for others in (zero, *other, leaf("symmetric", 8, 128, 32)):
        assert not pallas_int4.joins((symmetric, others), "gpu")
    assert pallas_int4.joins((symmetric, alike), "gpu") and not pallas_int4.joins((symmetric, alike), "tpu")


def test_a_block_calls_it_once_for_kernels_of_one_input():
    leaves = [jax.eval_shape(lambda: Int4Form().leaf(jnp.zeros((64, 128)), False)) for _ in range(3)]
    with kernel_choice.compiling_for("gpu"):
        made = jax.make_jaxpr(lambda x, leaves: matmul_together(x, leaves, "bfloat16"))
        text = str(made(jax.ShapeDtypeStruct((1, 1, 128), jnp.bfloat16), leaves))
    assert text.count("name=int4_product") == 1


@pytest.mark.parametrize(
    "M, R, W", [(1, 256, 768), (1, 17920, 768), (8, 1536, 4480), (512, 256, 768), (512, 1536, 4480)]
)
def test_tiles_fill_the_processors_or_as_far_as_parts_go(M, R, W):
    """One program multiplied the whole of the 8,960 inputs of `down` for each of its few tiles: 7 times slower."""
    tile = pallas_int4.tile(M, R, W, 16)
    programs = -(-M // 128) * -(-R // tile.rows) * tile.parts
    assert 2 * programs >= pallas_int4.PROCESSORS or tile.parts == 4
    assert tile.width * tile.parts <= max(W, 1024) and tile.width % 16 == 0


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_experts_are_multiplied_one_by_one(platform, monkeypatch):
    ours = functools.partial(pallas_int4.product, platform=platform, interpret=interpreted(platform))
    monkeypatch.setattr(products, "_tiled", ours)
    experts = jax.tree.map(lambda *arrays: jnp.stack(arrays), *(leaf("awq", 96, 128, 32) for _ in range(4)))
    experts = experts.replace(values=jnp.arange(4, dtype=jnp.uint8)[:, None, None] * 17 ^ experts.values)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((40, 128)), jnp.float32)
    sizes = jnp.array([7, 0, 30, 3])
    with kernel_choice.compiling_for(platform), kernel_choice.recording_kernels() as used:
        product = grouped_matmul(x, experts, sizes, "float32")
    assert used == {"grouped_matmul": {"blocked"}, "matmul_int4": {"pallas"}}
    of_rows = np.repeat(np.asarray(experts.dense(), np.float64), sizes, axis=0)
    np.testing.assert_allclose(product, np.einsum("ak,akn->an", x, of_rows), rtol=1e-5, atol=2e-5)


def test_it_is_chosen_on_one_device_of_its_platform():
    kernel = jax.eval_shape(lambda: Int4Form().leaf(jnp.zeros((64, 128)), False))
    for target, kind in (("gpu", "pallas"), ("tpu", "pallas"), ("cpu", "xla")):
        with kernel_choice.compiling_for(target), kernel_choice.recording_kernels() as used:
            jax.eval_shape(
                lambda kernel, x: matmul(x, kernel, "bfloat16"), kernel, jnp.ones((products.FEW_ROWS + 1, 128))
            )
        assert used["matmul_int4"] == {kind}


def test_without_triton_a_gpu_multiplies_through_xla(monkeypatch):
    """As with a JAX that has removed it; TPU kernels stay."""
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    monkeypatch.setattr(products, "has_triton", lambda: False)
    kernel, x = Int4Form().leaf(jnp.ones((64, 128)), False), jnp.ones((products.FEW_ROWS + 1, 128))
    for target, kind in (("gpu", "xla"), ("tpu", "pallas")):
        with kernel_choice.compiling_for(target), kernel_choice.recording_kernels() as used:
            jax.eval_shape(lambda kernel, x: matmul(x, kernel, "bfloat16"), kernel, x)
        assert used["matmul_int4"] == {kind}


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("axes", [("embed", "mlp"), ("mlp", "embed"), ("embed", "vocab")])
@pytest.mark.parametrize(
    "mesh_spec, form, rows, width",
    [
        ("data=2, fsdp=2, tensor=2", "zero", 4, 128),
        ("fsdp=4, tensor=2", "awq", 3, 128),  # three rows, which stay whole
        ("tensor=8", "minimum", 1, 96),  # three groups, which stay together
        ("data=4, tensor=2", "symmetric", 8, 99),  # the last group is not full
    ],
)
def test_each_device_multiplies_its_part(mesh_spec, form, rows, width, axes, platform, monkeypatch):
    monkeypatch.setattr(products, "_tiled", functools.partial(pallas_int4.product, platform=platform, interpret=True))
    kernel = leaf(form, 256, width, 32)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, 5, width)), jnp.float32)
    mesh = sharding.make_mesh(mesh_spec)
    with jax.set_mesh(mesh), kernel_choice.compiling_for(platform), kernel_choice.recording_kernels() as used:
        placed = jax.tree.map(
            lambda array, names: jax.device_put(array, NamedSharding(mesh, sharding.spec(names, array.shape, mesh))),
            *(kernel, kernel.axes(axes)),
        )
        multiply = jax.jit(lambda x, w: matmul(x, w, "float32", axes=axes))
        product = multiply(x, placed)
    assert used["matmul_int4"] == {"pallas"}
    np.testing.assert_allclose(product, np.asarray(x) @ np.asarray(kernel.dense(), np.float64), rtol=1e-5, atol=5e-5)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")  # has_triton says more
def test_nvidia_s_is_lowered_to_triton_and_no_weight_to_floats():
    """Lowered without the platform: what XLA is given to compile."""
    kernel = jax.eval_shape(lambda: Int4Form().leaf(jnp.zeros((1536, 576)), False))
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    x = jax.ShapeDtypeStruct((1, 576), jnp.float32)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
        traced = jax.jit(lambda x, kernel: pallas_int4.product(x, kernel, jnp.bfloat16, "gpu")).trace(x, kernel)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    shapes = re.findall(r"tensor<([\dx]+)x(?:bf16|f16|f32)>", text)
    assert "triton" in text and max(math.prod(map(int, shape.split("x"))) for shape in shapes) == kernel.scale.size


@pytest.mark.parametrize("batch, rows", [(1, None), (2, "data")])
def test_rows_are_divided_as_the_batch_and_not_by_tokens(batch, rows, monkeypatch):
    """One prompt of many tokens lies whole on each device of `data`, as its activations do."""
    shapes = []
    monkeypatch.setattr(products, "_products", lambda x, leaves, operand, layout: shapes.append(layout) or [x])
    with jax.set_mesh(sharding.make_mesh("data=2, tensor=4")), kernel_choice.compiling_for("gpu"):
        matmul(jnp.ones((batch, 64, 1024)), leaf("", 1024, 1024, 64), "bfloat16", axes=("embed", "mlp"))
    assert shapes[0].rows == rows and shapes[0].across == "tensor"
