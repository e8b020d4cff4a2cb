"""Memory estimates of a training step against the compiler's plan, and the FLOPs of its program."""

import functools

import flax.linen as nn
import jax
import pytest

import contract
from configs import base
from efficientllm import model
from efficientllm.cost import formulas, jaxpr_flops, step_memory
from efficientllm.metrics import memory
from efficientllm.objectives.next_token import NEXT_TOKEN
from efficientllm.registry import build
from efficientllm.train import step
from tiers import slow_case

ROWS, LENGTH = 4, 128
SIZE = "tiny(num_layers=4, dim=128, num_heads=4, num_kv_heads=2, head_dim=32, hidden=384)"


def described(method="full()", form="float32", **model):
    """(lm, method, abstract state, config.train) of a model whose activations outweigh its parameters."""
    config = base.get_config()
    config.model.unroll = 0
    config.train.batch_size, config.train.length = ROWS, LENGTH
    lm, method = contract.build("mixer", "gqa", size=SIZE, **model), build("adapter", method)
    lm = lm.clone(scan=False) if method.unrolled else lm
    state = nn.unbox(jax.eval_shape(step.init_state(lm, config.train, 0, LENGTH, method, form)))
    return lm, method, state, config.train


def planned(lm, method, state, train):
    """The compiler's total, without the reordering that trades memory for parallel work on CPUs."""
    run = jax.jit(lambda state, batch: step.train_step(lm, train, method, state, batch), donate_argnums=0)
    lowered = run.lower(state, NEXT_TOKEN.batch_shapes(lm, ROWS, LENGTH))
    options = {"xla_cpu_enable_concurrency_optimized_scheduler": False}
    return memory.compiled_memory(lowered.compile(compiler_options=options))["total_bytes"]


METHODS = [
    *("rslora(rank=4)", "lora_plus(rank=4)", "dora(rank=4)", "pissa(rank=4)", "loha(rank=4)", "lokr(rank=4)"),
    *("glora(rank=4)", "freeze(last=1)"),
]
CASES = [{}, {"remat": "full"}, slow_case({"method": "lora(rank=4)"}), slow_case({"ffn": "gelu"})]
CASES += [slow_case({"method": "lora(rank=4)", "form": form}) for form in ("nf4(block=32)", "int4(group=32)")]
CASES += [slow_case({"method": method}) for method in METHODS]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_memory_is_the_compilers(changes):
    description = described(**changes)
    lm, _, state, _ = description
    predicted = step_memory.predicted_bytes(lm, state, ROWS, LENGTH)
    assert predicted == pytest.approx(planned(*description), rel=memory.AGREE)


def test_no_array_is_made(monkeypatch):
    """A mesh of devices that are not attached may be in scope, which can hold none."""
    made, key = [], jax.random.key

    def recorded(seed):
        made.append(key(seed))
        return made[-1]

    lm, _, state, _ = described()
    monkeypatch.setattr(jax.random, "key", recorded)
    step_memory.predicted_bytes(lm, state, ROWS, LENGTH)
    assert made and all(isinstance(array, jax.core.Tracer) for array in made)


def test_what_is_frozen_has_no_gradient_and_no_moments():
    lm, _, state, _ = described()
    full = step_memory.predicted_bytes(lm, state, ROWS, LENGTH) - step_memory.activation_bytes(lm, state, ROWS, LENGTH)

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    weights = size(state.params)
    assert full == pytest.approx(4 * weights, rel=0.01)
    lm, _, state, _ = described("lora(rank=4)")
    tuned = step_memory.predicted_bytes(lm, state, ROWS, LENGTH) - step_memory.activation_bytes(lm, state, ROWS, LENGTH)
    assert tuned == pytest.approx(weights + 4 * size(state.params), rel=0.01)


@pytest.mark.slow
def test_bytes_that_a_step_moves():
    """Without activations: a closed formula of weights, gradients and two moments; micro-batches read weights again."""
    for method, frozen_too in (("full()", False), ("lora(rank=4)", True)):
        lm, _, state, _ = described(method)
        activation_bytes = step_memory.activation_bytes(lm, state, ROWS, LENGTH)

        def size(tree):
            return sum(leaf.size * 4 for leaf in jax.tree.leaves(tree))

        learnt, frozen = size(state.params), size(state.frozen)
        assert bool(frozen) == frozen_too
        moved = step_memory.moved_bytes(state, activation_bytes)
        assert moved - 2 * activation_bytes == pytest.approx(2 * (learnt + frozen) + 4 * learnt + 4 * learnt, abs=100)
        twice = step_memory.moved_bytes(state, activation_bytes, accumulate=2)
        assert twice - moved == 2 * (learnt + frozen) + learnt + 2 * activation_bytes


def test_a_program_executes_what_the_model_needs_and_what_remat_computes_twice():
    counted = {}
    for remat in ("none", "everything_saveable", "full"):
        lm, method, state, train = described(remat=remat, attention_kernel="xla")
        run = functools.partial(step.train_step, lm, train, method)
        counted[remat] = jaxpr_flops.count_needed_flops(run, state, NEXT_TOKEN.batch_shapes(lm, ROWS, LENGTH))
    boxed = model.abstract_params(lm)
    forward = ROWS * formulas.forward_flops(lm, boxed, LENGTH, executed=True)
    head = 2 * ROWS * LENGTH * lm.dim * lm.vocab_size
    assert counted["everything_saveable"] == 3 * forward
    # By default a CPU computes scores again, half of the products of a mixer.
    scores = sum(mixer.mix_flops(LENGTH, True) / 2 for (mixer,), _ in model.parts(lm)) * lm.num_groups
    assert counted["none"] == 3 * forward + ROWS * scores
    last = 2 * ROWS * LENGTH * lm.num_layers * 128 * 384  # the last product of a layer is not needed to go back
    assert counted["full"] == 4 * forward - head - last
    assert counted["everything_saveable"] > formulas.step_flops(lm, boxed, LENGTH, ROWS)  # masks


def test_accounts_that_differ_are_told():
    agree = {"peak_memory_bytes": 1.0e9, "compiled_memory_bytes": 0.9e9, "predicted_memory_bytes": None}
    assert memory.disagreement(agree) == ""
    told = memory.disagreement(agree | {"predicted_memory_bytes": 0.7e9})
    assert told == (
        "memory, more than 20% apart: 1.000 GB at the peak of the process, 0.900 GB planned by the compiler, "
        "0.700 GB by shapes"
    )
