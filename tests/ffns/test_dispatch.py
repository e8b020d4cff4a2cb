"""Expert dispatch plans: rows, the order in which capacity drops, and gathers that are transposes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficientllm.errors import UserError
from efficientllm.ffns import dispatch
from tiers import slow_case

B, T, E, K, D = 3, 10, 5, 2, 4


def random_experts(seed=0):
    """Distinct experts for each token, some of them much in demand."""
    noise = np.random.default_rng(seed).gumbel(size=(B, T, E)) + np.linspace(2, 0, E)
    return np.argsort(-noise, -1)[..., :K].astype(np.int32)


def dropped_in_order(experts, capacity):
    """First choices before second ones, earlier tokens before later ones; `[B, T, k]`, True where kept."""
    mask = np.zeros(experts.shape, bool)
    for b in range(experts.shape[0]):
        taken = np.zeros(E, int)
        for choice in range(experts.shape[2]):
            for t in range(experts.shape[1]):
                expert = experts[b, t, choice]
                mask[b, t, choice] = taken[expert] < capacity
                taken[expert] += 1
    return mask


def check_rows(plan, experts, rows_of_expert):
    """Each kept assignment lies in one row of its own, in the range of its expert, and the row names it."""
    N = experts.shape[0] * experts.shape[1]
    mask = np.ones((N, K), bool) if plan.kept_nk is None else np.asarray(plan.kept_nk)
    rows, assignments = np.asarray(plan.row_nk)[mask], np.arange(N * K).reshape(N, K)[mask]
    assert len(set(rows)) == len(rows)
    np.testing.assert_array_equal(np.asarray(plan.assignment_r)[rows], assignments)
    starts = np.concatenate([[0], np.cumsum(rows_of_expert)])
    expert = experts.reshape(N, K)[mask]
    assert (starts[expert] <= rows).all() and (rows < starts[expert + 1]).all()
    if plan.filled_r is not None:
        np.testing.assert_array_equal(np.flatnonzero(plan.filled_r), np.sort(rows))


@pytest.mark.parametrize("seed", [slow_case(0), 1, 2])
def test_dropless_has_a_row_for_every_assignment(seed):
    experts = random_experts(seed)
    plan = dispatch.dropless(experts, E)
    np.testing.assert_array_equal(plan.sizes_E, np.bincount(experts.ravel(), minlength=E))
    check_rows(plan, experts, plan.sizes_E)


@pytest.mark.parametrize("seed", [slow_case(0), 1, 2])
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.25, E / K])
def test_capacity_drops_in_the_stated_order(seed, factor):
    experts = random_experts(seed)
    plan = dispatch.capacity(experts, E, factor)
    C = int(np.ceil(T * K / E * factor))
    mask = dropped_in_order(experts, C)
    assert mask.all() == (factor == E / K)
    np.testing.assert_array_equal(plan.kept_nk, mask.reshape(B * T, K))
    check_rows(plan, experts, np.full(E, B * C))


def test_capacity_rounds_up_and_never_exceeds_the_row():
    assert dispatch.rows_per_expert(10, 4, 2, 1.0) == 5
    assert dispatch.rows_per_expert(10, 4, 2, 1.1) == 6
    assert dispatch.rows_per_expert(100, 10, 1, 1.1) == 11  # 11.000000000000002 in floating point
    assert dispatch.rows_per_expert(1, 64, 1, 1.0) == 1
    assert dispatch.rows_per_expert(100, 10, 1, 1e-9) == 1
    assert dispatch.rows_per_expert(0, 10, 1, 1e-9) == 0
    assert dispatch.rows_per_expert(10, 4, 2, 50.0) == 10


def test_a_later_first_choice_drops_an_earlier_second_one():
    """Why capacity with k > 1 is not causal: only the last token differs, and the first one's second choice goes."""
    wants_other, wants_same = np.array([[[0, 1], [2, 0]]]), np.array([[[0, 1], [1, 0]]])
    masks = [dispatch.capacity(experts.astype(np.int32), 3, 0.75).kept_nk[0] for experts in (wants_other, wants_same)]
    np.testing.assert_array_equal(masks, [[True, True], [True, False]])


@pytest.mark.parametrize("seed", [slow_case(0), 1, 2])
def test_with_one_choice_capacity_is_causal(seed):
    experts = random_experts(seed)[..., :1]
    changed = np.concatenate([experts[:, :6], (experts[:, 6:] + 1) % E], 1)
    before, after = (dispatch.capacity(e, E, 0.5).kept_nk.reshape(B, T) for e in (experts, changed))
    assert not before[:, :6].all() and (before[:, 6:] != after[:, 6:]).any()
    np.testing.assert_array_equal(before[:, :6], after[:, :6])


@pytest.mark.parametrize("plan_of", [dispatch.dropless, slow_case(lambda e, n: dispatch.capacity(e, n, 0.8))])
def test_gathers_and_their_gradients(plan_of):
    """Identity experts give back each token's weights, and the gradients are those that autodiff finds by scatter."""
    plan = plan_of(random_experts(), E)
    rng = np.random.default_rng(0)
    x_ND, weights_Nk = rng.standard_normal((B * T, D), np.float32), rng.standard_normal((B * T, K), np.float32)
    mask = np.ones((B * T, K)) if plan.kept_nk is None else plan.kept_nk

    def ours(x_ND, weights_Nk):
        y_RD = dispatch.to_experts(x_ND, plan) ** 2 * dispatch.weights_of_rows(weights_Nk, plan)
        return dispatch.from_experts(y_RD, plan)

    def plain(x_ND, weights_Nk):
        return x_ND**2 * jnp.sum(weights_Nk * mask, 1, keepdims=True)

    np.testing.assert_allclose(ours(x_ND, weights_Nk), plain(x_ND, weights_Nk), atol=1e-6)
    total = [jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), (0, 1))(x_ND, weights_Nk) for f in (ours, plain)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *total)


def test_more_assignments_than_32_bits_number():
    experts = jax.ShapeDtypeStruct((2**20, 1, 8), jnp.int32)
    with pytest.raises(UserError, match="8388608 assignments to 256 experts on one device are too many"):
        jax.eval_shape(lambda e: dispatch.dropless(e, 256), experts)
