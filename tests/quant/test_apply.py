"""Quantization of a whole model: chosen parameters, their axes, and programs on eight devices."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import contract
from efficientllm import model, sharding
from efficientllm.adapters import base
from efficientllm.errors import UserError
from efficientllm.ops import native
from efficientllm.quant.apply import quantize
from efficientllm.quant.base import Rows
from efficientllm.quant.int4 import Int4
from efficientllm.quant.int8 import Int8
from efficientllm.registry import build
from efficientllm.runtime import kernel_choice
from efficientllm.weights import path_of, resident_bytes

MOE = "moe(num_experts=4, top_k=2, hidden=32)"
TRAVELLING = "moe(num_experts=4, top_k=2, hidden=32, dispatch='capacity', capacity_factor=1.0)"


def boxed(lm):
    return model.abstract_params(lm)


def forms(params):
    """The type of each parameter, by path."""
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda leaf: isinstance(leaf, Rows))
    return {path_of(keys): type(leaf) for keys, leaf in flat[0]}


def test_kernels_get_the_form_and_embeddings_theirs():
    lm = contract.build("ffn", MOE, tied=False)
    names = forms(jax.eval_shape(lambda params: quantize(params, "int4"), nn.unbox(boxed(lm))))
    assert names.pop("embedding") is Int8 and names.pop("head/kernel") is Int8
    others = {path for path, form in names.items() if form is not Int4}
    router = "groups/block_0/ffn/router/kernel"
    assert others == {path for path in names if path.endswith(("scale", "bias"))} | {router}
    assert names["groups/block_0/ffn/experts/down/kernel"] is Int4


def test_rules_come_first():
    lm = contract.build("mixer", "gqa")
    rules = [("mixer/[qk]/", "float32"), ("embedding", "bfloat16"), ("ffn/down", "nf4")]
    names = forms(quantize(contract.parameters(lm), "int8(group=32)", rules))
    assert names["groups/block_0/mixer/q/kernel"] is not Int8 and names["groups/block_0/mixer/v/kernel"] is Int8
    assert names["embedding"].__name__ == "Half" and names["groups/block_0/ffn/down/kernel"].__name__ == "NF4"
    for bad in ([("(", "int8")], ["int8"]):
        with pytest.raises(UserError, match=r"pairs of \(regex, spec\)"):
            quantize({}, "int8", bad)


def test_boxes_name_the_axes_of_each_array():
    packed = jax.eval_shape(lambda params: quantize(params, "int4"), boxed(contract.build("mixer", "gqa")))
    kernel = packed["groups"]["block_0"]["mixer"]["q"]["kernel"]
    assert kernel.values.names == kernel.scale.names == ("layers", "heads", "embed")
    assert packed["embedding"].values.names == ("vocab", "embed")
    mesh = sharding.make_mesh("data=2, fsdp=2, tensor=2")
    where = sharding.shardings(packed, mesh)["groups"]["block_0"]["mixer"]["q"]["kernel"]
    assert where.values.spec == jax.sharding.PartitionSpec(None, "tensor", "fsdp")
    assert where.scale.spec == jax.sharding.PartitionSpec(None, "tensor", None)  # one group: left whole


def test_bytes_of_a_model():
    """int4 in groups of 32 is 4.5 bits a weight, and the embedding's int8 8 and a scale a row."""
    lm = contract.build("mixer", "gqa", size="tiny(num_layers=2, dim=64, num_heads=4, num_kv_heads=4, hidden=128)")
    plain = nn.unbox(boxed(lm))
    kernels_ = sum(leaf.size for keys, leaf in jax.tree_util.tree_leaves_with_path(plain) if "kernel" in str(keys))
    scales = sum(leaf.size for keys, leaf in jax.tree_util.tree_leaves_with_path(plain) if "scale" in str(keys))
    packed = jax.eval_shape(lambda params: quantize(params, "int4"), plain)
    assert resident_bytes(packed) == kernels_ * 4.5 / 8 + contract.VOCAB * (64 + 4) + 4 * scales


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh_spec, moe",
    [
        ("data=2, fsdp=2, tensor=2", MOE),
        ("fsdp=2, expert=4", TRAVELLING),
        ("expert=4, tensor=2", TRAVELLING),
    ],
)
def test_one_device_equals_eight(mesh_spec, moe):
    """Experts among them, also on an axis of their own; on a mesh XLA runs the products."""
    lm = contract.build("ffn", moe, size=contract.SIZE.replace("num_layers=2", "num_layers=1"))
    rules = [("embedding", "bfloat16"), ("mixer/", "int8")]
    packed = quantize(contract.parameters(lm), "int4", rules)
    exact = contract.logits(lm, contract.tokens(), packed)
    mesh = sharding.make_mesh(mesh_spec)
    with jax.set_mesh(mesh), kernel_choice.recording_kernels() as used:
        where = sharding.shardings(jax.eval_shape(lambda params: quantize(params, "int4", rules), boxed(lm)), mesh)
        ctx = contract.Context.packed(contract.positions())
        run = jax.jit(lambda params, ids: lm.apply({"params": params}, ids, ctx)[0], in_shardings=(where, None))
        logits = run(jax.device_put(packed, where), contract.tokens())
    assert used["matmul_int8"] == used["matmul_bfloat16"] == {"xla"}
    np.testing.assert_allclose(logits, exact, atol=2e-5)


@pytest.mark.slow
def test_adapters_learn_around_compressed_kernels():
    """QLoRA (arXiv:2305.14314): the gradients are those of LoRA over the same weights as plain arrays."""
    lm = contract.build("mixer", "gqa", size=contract.SIZE.replace("num_layers=2", "num_layers=1"), scan=False)
    method = build("adapter", "lora(rank=2)")
    packed = quantize(contract.parameters(lm), "nf4")
    grads = []
    for base_params in (packed, base.merge(packed)):
        params = nn.unbox(base.attach(method, boxed(lm), base_params, jax.random.key(0)))
        params = jax.tree_util.tree_map_with_path(
            lambda keys, leaf: leaf + 0.1 if path_of(keys).endswith("/b") else leaf, params
        )
        learnt, frozen = base.split(method, lm, params)
        grads.append(jax.jit(jax.grad(functools.partial(_loss, lm)))(learnt, frozen))
    assert len(jax.tree.leaves(grads[0])) == 14
    for grad, exact in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(grad, exact, atol=1e-5, rtol=1e-4)


def _loss(lm, learnt, frozen):
    packed = contract.batch()
    return contract.loss_fn(lm, base.join(learnt, frozen), packed, jnp.sum(packed["weights"]))[0]


def test_state_is_donated_beside_native_products():
    """A jitted step whose state is donated gives what one gives that keeps it."""
    lm, params = model.unroll(contract.build("mixer", "gqa"), contract.parameters(contract.build("mixer", "gqa")))
    packed = quantize(params, "int4")
    ctx = contract.Context.decoding(contract.positions(1))

    def step(params, ids, states):
        return lm.apply({"params": params}, ids, ctx, states)[:2]

    ids = contract.tokens()[:, :1]
    states = jax.tree.map(jnp.copy, model.init_states(lm, contract.B, 4))
    with kernel_choice.recording_kernels() as used:
        undonated, _ = jax.jit(step)(packed, ids, states)
    donated, _ = jax.jit(step, donate_argnums=2)(packed, ids, states)
    assert used["matmul_int4"] in ({"ffi"}, {"xla"})
    np.testing.assert_array_equal(undonated, donated)


@pytest.mark.slow
@pytest.mark.skipif(not native.instruction_sets(), reason="built without a compiler")
@pytest.mark.parametrize("form", ["int4", "bfloat16"])
def test_kernels_of_one_input_are_one_call(form):
    """q, k and v, o, gate and up, and down of each layer, and the head."""
    scanned = contract.build("mixer", "gqa")
    lm, params = model.unroll(scanned, contract.parameters(scanned))
    packed, states = quantize(params, form), model.init_states(lm, contract.B, 4)
    ctx = contract.Context.decoding(contract.positions(1))

    def step(params):
        return lm.apply({"params": params}, contract.tokens()[:, :1], ctx, states)[0]

    jaxpr = jax.make_jaxpr(step)(packed)
    assert str(jaxpr).count("target_name=efficientllm_products") == 4 * lm.num_layers + 1
    np.testing.assert_allclose(step(packed), step(base.merge(packed)), atol=2e-4)
