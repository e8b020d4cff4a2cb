"""Draws among the logits within `n` standard deviations of the greatest (Tang et al. 2024, arXiv:2411.07641)."""

import dataclasses

import jax
import jax.numpy as jnp

from efficientllm.registry import register


@register("sampler", "top_n_sigma")
@dataclasses.dataclass(frozen=True)
class TopNSigma:
    n: float = 1.0
    temperature: float = 1.0

    remembers = False  # it need not know which tokens a row holds

    def __call__(self, logits_BV, seen_BV, keys_B):
        finite_BV = jnp.isfinite(logits_BV)
        least_B1 = jnp.max(logits_BV, -1, keepdims=True) - self.n * jnp.std(
            logits_BV, -1, keepdims=True, where=finite_BV
        )
        kept_BV = jnp.where(finite_BV & (logits_BV >= least_B1), logits_BV / self.temperature, -jnp.inf)
        return jax.vmap(jax.random.categorical)(keys_B, kept_BV).astype(jnp.int32)
