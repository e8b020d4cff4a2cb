"""Text from a model: prefill in one pass, then one token at a time in a compiled loop over the state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from efficientllm import model as models
from efficientllm.ops.attention import Context


def generate(lm, params, prompt_BT, new_tokens, temperature, key, eos_id):
    """Samples `new_tokens` after each prompt -> int32 `[B, new_tokens]`.

    `eos_id` is a token or several; what follows one is the first of them.
    Prompts are of one length. Temperature 0 takes the likeliest token. Raises UserError for more tokens in all than the
    model has positions.
    """
    prompt = len(prompt_BT[0])
    models.check_length(lm, prompt + new_tokens, f"new_tokens = {new_tokens} after a prompt of {prompt}")
    lm, params = models.unroll(lm, params) if lm.scan else (lm, params)
    end_ids = tuple(np.atleast_1d(eos_id).tolist())
    return _generate(lm, new_tokens, temperature, end_ids, params, jnp.asarray(prompt_BT), key)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))  # of the module, so that a second call compiles nothing
def _generate(lm, new_tokens, temperature, end_ids, params, prompt_BT, key):
    B, T = prompt_BT.shape
    states = models.init_states(lm, B, T + new_tokens)
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    logits_BTV, states, _ = lm.apply({"params": params}, prompt_BT, Context.decoding(positions_BT), states)

    def step(carry, index):
        logits_BV, states, done_B = carry
        token_B = _pick(logits_BV, temperature, jax.random.fold_in(key, index))
        token_B = jnp.where(done_B, end_ids[0], token_B)
        positions_B1 = jnp.full((B, 1), T + index)
        logits_B1V, states, _ = lm.apply({"params": params}, token_B[:, None], Context.decoding(positions_B1), states)
        return (logits_B1V[:, 0], states, done_B | jnp.isin(token_B, jnp.array(end_ids))), token_B

    done_B = jnp.zeros(B, bool)
    _, tokens_TB = jax.lax.scan(step, (logits_BTV[:, -1], states, done_B), jnp.arange(new_tokens))
    return tokens_TB.T


def _pick(logits_BV, temperature, key):
    if temperature == 0:
        return jnp.argmax(logits_BV, -1).astype(jnp.int32)
    return jax.random.categorical(key, logits_BV / temperature).astype(jnp.int32)
