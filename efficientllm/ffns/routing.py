"""Top-k expert routing: scores, group-limited selection, load-balance loss and z-loss.

Letters: k experts of a token, J groups of experts, j groups of a token.
"""

import typing

import jax
import jax.numpy as jnp

from efficientllm import sharding


class Routing(typing.NamedTuple):
    """Routing of every token.

    Attributes:
      experts_BTk: the selected experts, best first.
      weights_BTk: the factor of each selected expert's output, float32.
      probabilities_BTE: the scores as a distribution over experts, float32.
    """

    experts_BTk: jax.Array
    weights_BTk: jax.Array
    probabilities_BTE: jax.Array


def _softmax(logits_BTE):
    probabilities_BTE = jax.nn.softmax(logits_BTE, -1)
    return probabilities_BTE, probabilities_BTE


def _sigmoid(logits_BTE):
    scores_BTE = jax.nn.sigmoid(logits_BTE)
    return scores_BTE, scores_BTE / jnp.sum(scores_BTE, -1, keepdims=True)


# Logits -> (scores, the same as a distribution over experts).
SCORES = {"softmax": _softmax, "sigmoid": _sigmoid}


def route(
    logits_BTE: jax.Array,
    top_k: int,
    scores: str,
    normalise: bool,
    scale: float,
    bias_E: jax.Array | None = None,
    groups: int = 1,
    top_groups: int = 1,
) -> Routing:
    """Selects the `top_k` experts of highest score (Shazeer et al. 2017, arXiv:1701.06538, Eq. 3-5).

    Args:
      scores: `softmax` (Mixtral, Qwen-MoE) or `sigmoid` (DeepSeek-V3).
      normalise: whether a token's weights are divided by their sum, before `scale` multiplies them.
      bias_E: added to the scores for the selection only (DeepSeek-V3, arXiv:2412.19437, Eq. 16). Weights are the
        unbiased scores, and the gradient of the bias is zero.
      groups, top_groups: experts are selected from the best `top_groups` of `groups` equal groups (`_within_groups`).
    """
    scores_BTE, probabilities_BTE = SCORES[scores](logits_BTE)
    choice_BTE = scores_BTE if bias_E is None else scores_BTE + bias_E
    if groups > 1:
        choice_BTE = _within_groups(choice_BTE, groups, top_groups, best=2 if scores == "sigmoid" else 1)
    experts_BTk = _best(jax.lax.stop_gradient(choice_BTE), top_k)
    # A comparison selects the weights: the gradient of a gather would be a scatter.
    weights_BTk = jnp.sum(jnp.where(_is_chosen(experts_BTk, logits_BTE.shape[-1]), scores_BTE[..., None, :], 0.0), -1)
    if normalise:
        weights_BTk = weights_BTk / (jnp.sum(weights_BTk, -1, keepdims=True) + 1e-20)
    return Routing(experts_BTk, weights_BTk * scale, probabilities_BTE)


def _within_groups(choice_BTE, groups, top_groups, best):
    """Masks the scores with -inf outside each token's best groups.

    The score of a group is the sum of its `best` highest scores: one in DeepSeek-V2 (arXiv:2405.04434, Section 2.2.2),
    two in V3 (arXiv:2412.19437, Section 2.1.2).
    """
    choice_BTJE = choice_BTE.reshape(*choice_BTE.shape[:-1], groups, -1)
    worth_BTJ = jnp.max(choice_BTJE, -1)
    if best == 2:
        is_first = jax.nn.one_hot(jnp.argmax(choice_BTJE, -1), choice_BTJE.shape[-1], dtype=bool)
        worth_BTJ += jnp.max(jnp.where(is_first, -jnp.inf, choice_BTJE), -1)
    chosen_BTj = _best(jax.lax.stop_gradient(worth_BTJ), top_groups)
    is_chosen_BTJ = jnp.any(_is_chosen(chosen_BTj, groups), -2)
    return jnp.where(is_chosen_BTJ[..., None], choice_BTJE, -jnp.inf).reshape(choice_BTE.shape)


def _best(choice_BTE, top_k):
    def best(choice_BTE):
        return jax.lax.top_k(choice_BTE, top_k)[1]

    mesh = sharding.current_mesh()
    if mesh is not None and mesh.size > 1:
        # XLA does not shard top_k: every device would compute it for all tokens.
        layout = sharding.spec(("batch", "length", None), choice_BTE.shape, mesh)
        best = jax.shard_map(best, in_specs=layout, out_specs=layout, check_vma=False)
    return best(choice_BTE)


def load(experts_BTk: jax.Array, num_experts: int, real_BT: jax.Array | None = None) -> jax.Array:
    """Computes each expert's share of the assignments, `[E]`: sums to one, 1/E where balanced.

    Here and below, `real_BT` is False for padding, which does not count; None: no token is padding.
    """
    return mean(jnp.mean(_is_chosen(experts_BTk, num_experts).astype(jnp.float32), 2), real_BT)


def load_balance_loss(routing: Routing, load_E: jax.Array, real_BT: jax.Array | None = None) -> jax.Array:
    """Computes E sum_e f_e P_e over the batch (Switch: Fedus et al. 2021, arXiv:2101.03961, Eq. 4-6).

    f_e is expert e's assignments per token and P_e its mean probability. f sums to k, as in transformers, so a balanced
    router has the value k. DeepSeek-V3's balance loss is this divided by k. With gradient accumulation each micro-batch
    has its own product: f of the whole batch is not known before the last one.
    """
    num_experts, top_k = load_E.shape[0], routing.experts_BTk.shape[-1]
    return num_experts * top_k * jnp.sum(load_E * mean(routing.probabilities_BTE, real_BT))


def z_loss(logits_BTE: jax.Array, real_BT: jax.Array | None = None) -> jax.Array:
    """Computes the mean squared log of the softmax denominator (ST-MoE: Zoph et al. 2022, arXiv:2202.08906, Eq. 5)."""
    return mean(jax.nn.logsumexp(logits_BTE, -1) ** 2, real_BT)


def entropy(probabilities_BTE: jax.Array, real_BT: jax.Array | None = None) -> jax.Array:
    """Computes the mean entropy of a token's distribution over experts, in nats: between 0 and log E (uniform)."""
    return -mean(jnp.sum(jax.scipy.special.xlogy(probabilities_BTE, probabilities_BTE), -1), real_BT)


def mean(values_BT: jax.Array, real_BT: jax.Array | None) -> jax.Array:
    """Averages `[B, T, ...]` over the tokens without padding; zero if there are none."""
    if real_BT is None:
        return jnp.mean(values_BT, (0, 1))
    real = real_BT.reshape(*real_BT.shape, *(1,) * (values_BT.ndim - 2))
    return jnp.sum(jnp.where(real, values_BT, 0.0), (0, 1)) / jnp.maximum(jnp.sum(real_BT), 1)


def _is_chosen(experts_BTk, num_experts):
    return experts_BTk[..., None] == jnp.arange(num_experts)
