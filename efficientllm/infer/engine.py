"""Generation for prompts of any lengths: prefill in one pass, then decoding in compiled runs of steps over the state.

A batch is prefilled as far as its shortest prompt goes. In the steps after that a row whose prompt goes on is given its
next token, and one whose prompt has ended chooses its own: no row is padded, so that states of every kind (caches,
rings, recurrences) hold what they would hold alone.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from efficientllm import model as models
from efficientllm.attention import Context
from efficientllm.errors import UserError


@flax.struct.dataclass
class Carry:
    """What a step hands to the next: logits of the next token, states, its position, which rows have ended, and which
    tokens a row holds (`seen_BV`, one column for samplers that do not ask)."""

    logits_BV: jax.Array
    states: tuple
    position: jax.Array
    done_B: jax.Array
    seen_BV: jax.Array


class Engine:
    """Generates with `lm` (its layers are taken apart) and its parameters, prompts and answers within `length` tokens.

    `sampler` is a registered `sampler`. Raises UserError for more tokens than the model has positions.
    """

    def __init__(self, lm, params, sampler, eos_id, length):
        models.check_length(lm, length, f"prompts and answers of {length} tokens")
        self.lm, self.params = models.unroll(lm, params) if lm.scan else (lm, params)
        self.sampler, self.eos_id, self.length = sampler, eos_id, length
        self._prefill = jax.jit(functools.partial(_prefill, self.lm, sampler, length))
        self._decode = jax.jit(
            functools.partial(_decode, self.lm, sampler, eos_id), static_argnames="steps", donate_argnums=1
        )

    def prefill(self, prompts):
        """A Carry after the common part of the prompts, lists of ids. Raises UserError for an empty prompt."""
        check_prompts(prompts)
        shared = min(map(len, prompts))
        return self._prefill(self.params, jnp.asarray([prompt[:shared] for prompt in prompts], jnp.int32))

    def decode(self, carry, prompts, steps, key):
        """`steps` further tokens of each row, those of its prompt included -> `(Carry, int32 [B, steps])`."""
        longest = max(map(len, prompts))
        table_BT = np.zeros((len(prompts), longest), np.int32)
        for row, prompt in enumerate(prompts):
            table_BT[row, : len(prompt)] = prompt
        lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
        return self._decode(self.params, carry, table_BT, lengths_B, key, steps=steps)

    def generate(self, prompts, new_tokens, seed=0, chunk=None, stop=None):
        """Yields, for each run of `chunk` steps, the new ids of each row so far (lists; eos ends one and is in it).

        `stop(ids) -> bool` ends a row early. The last value holds at most `new_tokens` ids a row.
        """
        carry, key = self.prefill(prompts), jax.random.key(seed)
        at, end = min(map(len, prompts)), max(map(len, prompts)) + new_tokens
        found = [[] for _ in prompts]
        ended = [False] * len(prompts)
        while at < end and not all(ended):
            steps = min(chunk or end - at, end - at)
            carry, new_BS = self.decode(carry, prompts, steps, key)
            for row, ids in enumerate(np.asarray(new_BS).tolist()):
                for offset, id in enumerate(ids):
                    if at + offset < len(prompts[row]) or ended[row]:
                        continue
                    found[row].append(id)
                    ended[row] = id == self.eos_id or len(found[row]) == new_tokens or bool(stop and stop(found[row]))
            at += steps
            yield [list(ids) for ids in found]


def check_prompts(prompts):
    """Raises UserError for no prompts and for an empty one."""
    if not prompts:
        raise UserError("config.infer.prompts is empty: give a text or a file")
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"config.infer.prompts: prompt {index} has no tokens; give it a text")


def _prefill(lm, sampler, length, params, prompt_BT):
    B, T = prompt_BT.shape
    states = models.init_states(lm, B, length)
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    ctx = Context.decoding(positions_BT)
    x_BTD, states, _ = lm.apply({"params": params}, prompt_BT, ctx, states, readout=False)
    logits_BV = models.read_out(lm, params, x_BTD[:, -1:])[:, 0]  # of the last token alone
    seen_BV = jnp.zeros((B, lm.vocab_size if sampler.remembers else 1), bool)
    if sampler.remembers:
        seen_BV = seen_BV.at[jnp.arange(B)[:, None], prompt_BT].set(True)
    return Carry(logits_BV, states, jnp.int32(T), jnp.zeros(B, bool), seen_BV)


def _decode(lm, sampler, eos_id, params, carry, table_BT, lengths_B, key, steps):
    B, longest = table_BT.shape

    def step(carry, _):
        chosen_B = sampler(carry.logits_BV, carry.seen_BV, jax.random.fold_in(key, carry.position))
        given_B = table_BT[:, jnp.minimum(carry.position, longest - 1)]
        in_prompt_B = carry.position < lengths_B
        token_B = jnp.where(in_prompt_B, given_B, jnp.where(carry.done_B, eos_id, chosen_B))
        positions_B1 = jnp.full((B, 1), carry.position)
        ctx = Context.decoding(positions_B1)
        logits_B1V, states, _ = lm.apply({"params": params}, token_B[:, None], ctx, carry.states)
        seen_BV = carry.seen_BV
        if sampler.remembers:
            seen_BV = seen_BV.at[jnp.arange(B), token_B].set(True)
        done_B = carry.done_B | (~in_prompt_B & (token_B == eos_id))
        return Carry(logits_B1V[:, 0], states, carry.position + 1, done_B, seen_BV), token_B

    carry, tokens_SB = jax.lax.scan(step, carry, None, length=steps)
    return carry, tokens_SB.T
