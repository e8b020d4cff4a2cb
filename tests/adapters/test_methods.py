"""Tuning methods on a model: trainable and frozen parameters and their cost, on one device and on eight."""

import functools
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import contract
from configs import base
from efficientllm import model, sharding
from efficientllm.adapters.base import attach, join, merge, split
from efficientllm.cost import formulas
from efficientllm.cost.jaxpr_flops import count_needed_flops
from efficientllm.errors import UserError
from efficientllm.ops.attention import Context
from efficientllm.ops.native import flash
from efficientllm.quant.base import Rows
from efficientllm.registry import build, lookup, names
from efficientllm.train import step
from efficientllm.weights import box_as
from tiers import slow_case, slow_except

pytestmark = pytest.mark.xdist_group("methods")  # they share models and compiled programs
SPECS = {
    "lora": "lora(rank=4, alpha=6)",
    "rslora": "rslora(rank=4, alpha=6)",
    "lora_plus": "lora_plus(rank=4, alpha=6, ratio=8)",
    "dora": "dora(rank=4, alpha=6)",
    "pissa": "pissa(rank=4, alpha=6)",
    "loha": "loha(rank=4)",
    "lokr": "lokr(rank=4)",
    "glora": "glora(rank=4)",
    "full": "full()",
    "freeze": "freeze(last=1)",
}
DROPPING = ("lora(rank=4, alpha=6, dropout=0.5)", "dora(rank=4, alpha=6, dropout=0.5)")
MOE = "moe(num_experts=8, top_k=2, hidden=32, bias_rate=0.01)"


def cases(*techniques, default):
    """Every method with every technique; those of the ids `default` run by default."""
    specs = []
    for name in SPECS:
        for kind, technique in techniques:
            case = f"{name}-{technique.partition('(')[0]}"
            marks = [] if case in default else [pytest.mark.slow]
            specs.append(pytest.param(name, kind, technique, marks=marks, id=case))
    return specs


def test_every_method_is_here():
    assert set(SPECS) == {
        name for name in names("adapter") if lookup("adapter", name).__module__.startswith("efficientllm.")
    }


@functools.cache
def forward(lm):
    batch = contract.batch()
    ctx = Context.packed(batch["positions"], batch["segments"])
    return jax.jit(lambda p: lm.apply({"params": p}, batch["tokens"], ctx)[0])


@functools.cache
def tuned(spec, kind="mixer", technique="gqa", form="float32"):
    """`(method, lm, plain parameters, TrainState)` with every learnt array moved from its initial value."""
    method = build("adapter", SPECS.get(spec, spec))
    lm = contract.build(kind, technique)
    params = contract.parameters(lm)
    lm, params = model.unroll(lm, params) if method.unrolled else (lm, params)
    state = start(method, lm, params, form)
    noise = np.random.default_rng(1)
    moved = jax.tree.map(lambda leaf: leaf + 0.05 * noise.standard_normal(leaf.shape, np.float32), state.params)
    return method, lm, params, state.replace(params=moved)


def start(method, lm, params, form="float32"):
    config = base.get_config()
    config.model.unroll = 0
    boxed = model.abstract_params(lm)
    boxed_params = box_as(boxed, params)
    return nn.unbox(step.create(lm, config.train, method, 0, boxed, boxed_params, form))


def logits(lm, params):
    return forward(lm)(params)


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
def test_the_model_is_the_same_at_step_0(spec):
    method, lm, params, _ = tuned(spec)
    before = logits(lm, params)
    np.testing.assert_allclose(logits(lm, start(method, lm, params).all_params), before, atol=2e-5)


@pytest.mark.parametrize(
    "spec, kind, technique", cases(("mixer", "gqa"), ("mixer", "mla"), ("ffn", MOE), default=("lora-gqa", "freeze-gqa"))
)
def test_leaves_multiply_as_their_dense_kernels_do(spec, kind, technique):
    _, lm, params, state = tuned(spec, kind, technique)
    logits_BTV = logits(lm, state.all_params)
    np.testing.assert_allclose(logits_BTV, logits(lm, merge(state.all_params)), atol=1e-4)
    assert jnp.abs(logits_BTV - logits(lm, params)).max() > 1e-2


ADAPTERS = [name for name in SPECS if build("adapter", SPECS[name]).learnt and name != "pissa"]


@pytest.mark.slow
@pytest.mark.parametrize("spec", slow_except(ADAPTERS, "lora"))
def test_beside_rounded_kernels_it_learns_as_beside_what_they_stand_for(spec):
    """QLoRA: arXiv:2305.14314, Eq. 5, with every method that has leaves."""
    method, lm, params, _ = tuned(spec)
    state = start(method, lm, params, "nf4(block=32)")

    def rounded(leaf):
        return isinstance(leaf, Rows)

    names = {leaf.name for leaf in jax.tree.leaves(state.frozen, is_leaf=rounded) if rounded(leaf)}
    assert names == {"nf4"} and not rounded(state.frozen["embedding"])
    dense = jax.tree.map(lambda leaf: leaf.dense() if rounded(leaf) else leaf, state.all_params, is_leaf=rounded)
    run = jax.jit(lambda learnt, frozen: step.gradients(lm, learnt, contract.batch(), 1, frozen))
    (ours, metrics), (theirs, expected) = run(state.params, state.frozen), run(*split(method, lm, dense))
    np.testing.assert_allclose(metrics["loss"], expected["loss"], atol=1e-5)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    plain = logits(lm, params)
    assert jnp.abs(logits(lm, state.all_params) - plain).max() > 1e-3  # it is rounded


@pytest.mark.parametrize("spec", slow_except(SPECS, "lora", "freeze"))
def test_what_is_frozen_stays_and_what_learns_moves(spec):
    config = base.get_config()
    config.model.unroll = 0
    method, lm, _, state = tuned(spec, "mixer", "gqa")
    run = jax.jit(functools.partial(step.train_step, lm, config.train, method))
    after = state.replace(step=state.step + 1)  # past the first step of the warm-up, whose rate is zero
    for _ in range(2):
        after, metrics = run(after, contract.batch())
    jax.tree.map(np.testing.assert_array_equal, state.frozen, after.frozen)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state.params, after.params)
    assert all(jax.tree.leaves(moved)), moved
    assert np.isfinite(metrics["loss"])
    learnt = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * learnt
    if method.learnt:
        assert learnt < 0.5 * sum(leaf.size for leaf in jax.tree.leaves(state.frozen))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["nf4(block=32)", "int4(group=32)"])
def test_flops_beside_rounded_kernels_are_the_same(form):
    method, lm, params, state = tuned("lora")
    rounded = start(method, lm, params, form)

    def count(state):
        return count_needed_flops(lambda s: step.gradients(lm, s.params, contract.batch(), 1, s.frozen), state)

    assert count(rounded) == count(state)


@pytest.mark.parametrize(
    "spec, kind, technique", cases(("mixer", "gqa"), ("mixer", "mla"), default=("lora-gqa", "lokr-gqa", "freeze-gqa"))
)
def test_flops_are_the_programs(spec, kind, technique):
    check_flops(*tuned(spec, kind, technique))


@pytest.mark.slow
@pytest.mark.parametrize("spec", [*SPECS, *DROPPING])
@pytest.mark.parametrize("way", ["kernel='ragged_dot'", "dispatch='capacity', capacity_factor=1.0"])
def test_flops_around_experts_are_the_programs(spec, way):
    check_flops(*tuned(spec, "ffn", MOE.replace("bias_rate", f"{way}, bias_rate")))


@pytest.mark.parametrize("spec", slow_except(DROPPING, DROPPING[1]))
def test_flops_of_dropping_are_the_programs(spec):
    check_flops(*tuned(spec))


def check_flops(method, lm, _, state):
    batch, key = contract.batch(), jax.random.key(0)
    lm = lm.clone(remat="everything_saveable")  # by default a CPU multiplies scores twice, natively always
    with mock.patch.object(flash, "is_usable", lambda: False):
        counted = count_needed_flops(lambda s: step.gradients(lm, s.params, batch, 1, s.frozen, key), state)
    expected = formulas.step_flops(lm, model.abstract_params(lm), contract.T, contract.B, method)
    # The program multiplies what the causal mask then drops; below the layers that learn only forward.
    dropped = sum(mixer.mix_flops(contract.T, True) - mixer.mix_flops(contract.T) for (mixer,), _ in model.parts(lm))
    passes = 3 + 1 if method.unrolled else 3 * lm.num_groups
    assert counted == expected + contract.B * dropped * passes


CUBE = "data=2, fsdp=2, tensor=2"
TRAVELLING = MOE.replace("bias_rate", "dispatch='capacity', capacity_factor=1.0, bias_rate")


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec, technique, mesh_spec, form",
    [
        ("lokr", "gqa", CUBE, "float32"),
        *(
            slow_case(*case)
            for case in (
                ("lora", MOE, CUBE, "float32"),
                ("dora", MOE, CUBE, "float32"),
                ("lora", TRAVELLING, "fsdp=2, expert=4", "float32"),
                ("dora", TRAVELLING, "expert=8", "float32"),
                ("lokr", TRAVELLING, "expert=4, tensor=2", "float32"),
                ("full", TRAVELLING, "data=2, expert=4", "float32"),
                ("lora", TRAVELLING, "fsdp=2, expert=2, tensor=2", "nf4(block=32)"),
                ("dora", TRAVELLING, "fsdp=2, expert=4", "int8"),
            )
        ),
    ],
)
def test_one_device_equals_eight(spec, technique, mesh_spec, form):
    """Experts on an axis of their own too, with adapters, rounded, and both."""
    method, lm, _, state = tuned(spec, "mixer" if technique == "gqa" else "ffn", technique, form)

    def run(s):
        return step.gradients(lm, s.params, contract.batch(), 1, s.frozen)[0]

    on_one_device = jax.jit(run)(state)
    mesh = sharding.make_mesh(mesh_spec)
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(step.init_state(lm, base.get_config().train, 0, contract.T, method, form))
        where = sharding.shardings(abstract, mesh)
        many = jax.jit(run, in_shardings=(where,))(jax.device_put(state, where))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), on_one_device, jax.device_get(many)
    )


def test_layers_apart_are_the_layers_stacked():
    _, lm, _, state = tuned("dora")
    loop, params = model.unroll(lm, state.all_params)
    np.testing.assert_allclose(logits(lm, state.all_params), logits(loop, params), atol=1e-5)


@pytest.mark.slow
def test_a_rule_on_b_is_all_that_lora_plus_is():
    train = base.get_config().train
    train.optimizer, train.clip, train.schedule = "sgd(momentum=0.0)", 0.0, "constant(peak=1.0)"
    for name, ratio in (("lora", 1.0), ("lora_plus", 8.0)):
        method, lm, params, _ = tuned(name)
        state = start(method, lm, params)
        grads = jax.jit(lambda s, lm=lm: step.gradients(lm, s.params, contract.batch(), 1, s.frozen)[0])(state)
        optimizer = step.from_config.optimizer(train, state.params, method.rates)
        state = state.replace(opt_state=optimizer.init(state.params))
        after, _ = jax.jit(functools.partial(step.train_step, lm, train, method))(state, contract.batch())

        def leaf(tree):
            return tree["groups"]["block_0"]["mixer"]["q"]["kernel"]

        np.testing.assert_allclose(leaf(after.params).b, -ratio * leaf(grads).b, rtol=1e-5)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("lora(rank=0)", "rank = 0: must be at least 1"),
        ("lora(target='nothing')", "finds none of the kernels"),
        ("lora(target='(')", "is no regex"),
        ("pissa(rank=64)", "too large"),
        ("freeze(last=3)", "the model has 2"),
        ("freeze(last=1, first=1)", "set one, above 0"),
        ("lorra", "did you mean 'lora'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(spec, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as error:
        method = build("adapter", spec, where="config.adapter")
        lm = contract.build("mixer", "gqa")
        method.check(lm)
        start(method, lm, contract.parameters(lm))
    assert "\n" not in str(error.value)


def test_join_undoes_split():
    method, lm, _, state = tuned("dora")
    learnt, frozen = split(method, lm, state.all_params)
    jax.tree.map(np.testing.assert_array_equal, join(learnt, frozen), state.all_params)
    assert attach(build("adapter", "full"), {}, {"x": 1}, None) == {"x": 1}
