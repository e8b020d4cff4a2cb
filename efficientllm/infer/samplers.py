"""Samplers: greedy, or random with temperature, top-k, top-p, min-p and a repetition penalty."""

import dataclasses

import jax
import jax.numpy as jnp

from efficientllm.errors import UserError
from efficientllm.registry import register


@register("sampler", "greedy")
@dataclasses.dataclass(frozen=True)
class Greedy:
    """The most likely token."""

    remembers = False

    def __call__(self, logits_BV, seen_BV, keys_B):
        return jnp.argmax(logits_BV, -1).astype(jnp.int32)


@register("sampler", "sample")
@dataclasses.dataclass(frozen=True)
class Sample:
    """Samples from the softmax of the logits, filtered in this order, as transformers does.

    repetition_penalty:  of Keskar et al. 2019 (arXiv:1909.05858, Section 4.1); 1 is none.
    temperature:         0 is greedy.
    top_k:               keep the k most likely tokens; 0 keeps all.
    top_p:               keep the smallest set of tokens with this probability; 1 keeps all.
    min_p:               keep tokens with at least `min_p` times the largest probability.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise UserError(
                f"config.infer.sampler = {self}: temperature and top_k are at least 0, top_p above 0 and at most 1, "
                "min_p between 0 and 1"
            )
        if self.repetition_penalty <= 0:
            raise UserError(f"config.infer.sampler: repetition_penalty = {self.repetition_penalty} must be above 0")

    @property
    def remembers(self) -> bool:
        """Whether the sampler needs `seen_BV`, the tokens that a row contains."""
        return self.repetition_penalty != 1

    def __call__(self, logits_BV, seen_BV, keys_B):
        logits_BV = self.filtered(logits_BV, seen_BV)
        if self.temperature == 0:
            return jnp.argmax(logits_BV, -1).astype(jnp.int32)
        return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)

    def filtered(self, logits_BV: jax.Array, seen_BV: jax.Array | None = None) -> jax.Array:
        """Filters the logits; tokens that cannot be sampled get -inf."""
        if self.remembers:
            penalised = jnp.where(
                logits_BV > 0, logits_BV / self.repetition_penalty, logits_BV * self.repetition_penalty
            )
            logits_BV = jnp.where(seen_BV, penalised, logits_BV)
        if self.temperature == 0:
            return logits_BV
        logits_BV = logits_BV / self.temperature
        if self.top_k:
            least_B1 = jax.lax.top_k(logits_BV, min(self.top_k, logits_BV.shape[-1]))[0][:, -1:]
            logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
        if self.top_p < 1:
            logits_BV = jnp.where(self._beyond_top_p(logits_BV), -jnp.inf, logits_BV)
        if self.min_p:
            probabilities_BV = jax.nn.softmax(logits_BV)
            unlikely_BV = probabilities_BV < self.min_p * jnp.max(probabilities_BV, -1, keepdims=True)
            logits_BV = jnp.where(unlikely_BV, -jnp.inf, logits_BV)
        return logits_BV

    def _beyond_top_p(self, logits_BV):
        """True for tokens outside the smallest set with probability `top_p`."""
        order_BV = jnp.argsort(-logits_BV, -1)
        sorted_BV = jnp.take_along_axis(jax.nn.softmax(logits_BV), order_BV, -1)
        beyond_BV = jnp.cumsum(sorted_BV, -1) - sorted_BV >= self.top_p
        rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
        return jnp.zeros_like(beyond_BV).at[rows_B1, order_BV].set(beyond_BV)
