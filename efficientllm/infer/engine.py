"""Generation for prompts of any lengths: prefill, then a compiled loop of steps over a donated state.

No row is padded and each has its own positions and random numbers, so that states of every kind (caches, rings,
recurrences) and what is drawn are what they would be alone.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from efficientllm import model as models
from efficientllm.errors import UserError
from efficientllm.ops.attention import Context
from efficientllm.runtime import kernel_choice
from efficientllm.sharding import constrain, current_mesh, shapes
from efficientllm.weights import activation_dtype

# XLA for GPUs would put gate and up side by side to multiply them at once, by a copy of both for every pass: 38 us a
# layer of 1.5B on an H100, an eighth of the time to the first token.
APART = {"xla_gpu_dot_merger_threshold_mb": "0"}
PIECES = (256, 64, 16)  # tokens of prompts of several lengths that are prefilled together; each compiles a program


@flax.struct.dataclass
class Carry:
    """What a step hands to the next: logits of the next token, states, the positions the next tokens take, which rows
    have ended, which tokens a row holds (`seen_BV`, one column for samplers that do not ask), a random key a row."""

    logits_BV: jax.Array
    states: tuple
    positions_B: jax.Array
    done_B: jax.Array
    seen_BV: jax.Array
    keys_B: jax.Array


class Engine:
    """Generates with `lm` (its layers are taken apart) and its parameters, prompts and answers within `length` tokens.

    Prompts of one length are prefilled in one pass. Of others, as many tokens as are in whole PIECES, a piece at a time
    in all rows that still have one; the rest are given to the first steps of the loop, in which a row whose prompt has
    ended chooses its own. With `pieces` it is so for prompts of one length too: few programs for many lengths.

    On the mesh in scope rows, heads and channels of states are divided as those of activations are. `sampler` is a
    registered `sampler`. `end_ids` is the token at which a row ends, or several; -1 is none. Raises UserError for more
    tokens than the model has positions.
    """

    def __init__(self, lm, params, sampler, end_ids, length, pieces=False):
        models.check_length(lm, length, f"prompts and answers of {length} tokens")
        self.lm, self.params = models.unroll(lm, params) if lm.scan else (lm, params)
        self.end_ids = tuple(np.atleast_1d(end_ids).tolist())
        self.sampler, self.length, self.pieces = sampler, length, pieces
        self._by_length, self._switch = models.depends_on_length(lm)
        self._empty = jax.jit(functools.partial(_empty, self.lm, length), static_argnums=0)
        options = APART if kernel_choice.platform() == "gpu" else None
        self._prefill = jax.jit(functools.partial(_prefill, self.lm), donate_argnums=(1, 2), compiler_options=options)
        self._begin = jax.jit(functools.partial(_begin, self.lm), donate_argnums=1)
        self._decode = jax.jit(functools.partial(_decode, self.lm, sampler, self.end_ids, length), donate_argnums=1)
        self._replace = jax.jit(functools.partial(_replace, self.lm), donate_argnums=0)

    @property
    def extends(self):
        """Whether a carry can go on with a longer prompt: not where keys are rotated by a prompt's length."""
        return not self._by_length

    def prefill(self, prompts, seed=0, first=0, carry=None):
        """A Carry after the prompts, lists of ids, or as far as they are in whole pieces.

        `first` is the number of the first prompt: what is drawn depends on the seed and a prompt's number, not on the
        rows beside it. `carry`, which is donated, is one after the beginnings of the prompts, where the engine
        `extends`. Raises UserError for an empty prompt.
        """
        check_prompts(prompts)
        rows = len(prompts)
        at_B = np.zeros(rows, np.int32) if carry is None else np.array(carry.positions_B)
        if carry is None:
            states, hidden_BD = self._empty(rows)
        else:
            states, hidden_BD = carry.states, jnp.zeros((rows, self.lm.dim), activation_dtype(self.lm.precision))
        for who, size in self._passes([len(prompt) - at for prompt, at in zip(prompts, at_B, strict=True)]):
            ids_BT = np.array([prompts[row][at_B[row] : at_B[row] + size] for row in who], np.int32)
            some = None if len(who) == rows else np.array(who)
            reach_B = np.array([len(prompts[row]) for row in who], np.int32) if self._by_length else None
            states, hidden_BD = self._prefill(self.params, states, hidden_BD, ids_BT, some, at_B[who], reach_B)
            at_B[who] += size
        seen_BV = np.zeros((rows, self.lm.vocab_size if self.sampler.remembers else 1), bool)
        if self.sampler.remembers:
            for row, prompt in enumerate(prompts):
                seen_BV[row, prompt] = True
        return self._begin(self.params, states, hidden_BD, at_B, seen_BV, np.int32(seed), first + np.arange(rows))

    def _passes(self, lengths):
        """Yields `(rows, tokens)` of each pass of prefill."""
        if len(set(lengths)) == 1 and not self.pieces:
            yield list(range(len(lengths))), lengths[0]
            return
        left = list(lengths)
        for size in PIECES:
            while who := [row for row, count in enumerate(left) if count >= size]:
                yield who, size
                for row in who:
                    left[row] -= size

    def decode(self, carry, prompts, steps):
        """`steps` further tokens of each row, those of its prompt included -> `(Carry, int32 [B, steps])`.

        The carry is donated. Steps end early where all rows have; what follows an end is the first of `end_ids`.
        """
        table_BT = np.zeros((len(prompts), self.length), np.int32)
        for row, prompt in enumerate(prompts):
            table_BT[row, : len(prompt)] = prompt
        lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
        carry, tokens_BT = self._decode(self.params, carry, table_BT, lengths_B, np.int32(steps))
        return carry, tokens_BT[:, :steps]

    def lower_decode(self, rows):
        """The loop for `rows` rows, lowered: what compiling it takes and needs can be looked at ahead of time."""
        return self.trace_decode(rows).lower()

    def trace_decode(self, rows):
        """The loop for `rows` rows, traced. The parameters may be abstract, here and in `trace_prefill`."""
        carry = self._abstract_carry(rows)
        table_BT = jax.ShapeDtypeStruct((rows, self.length), jnp.int32)
        lengths_B = jax.ShapeDtypeStruct((rows,), jnp.int32)
        return self._decode.trace(self.params, carry, table_BT, lengths_B, jax.ShapeDtypeStruct((), jnp.int32))

    def trace_prefill(self, rows, tokens):
        """`(the pass over so many tokens of each of `rows` prompts, what makes the first carry of it)`, traced."""
        carry = self._abstract_carry(rows)
        _, hidden_BD = jax.eval_shape(functools.partial(_empty, self.lm, self.length, rows))
        states, hidden_BD = carry.states, shapes(hidden_BD, ("batch", None))
        ids_BT, numbers_B = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, tokens), (rows,)))
        reach_B = numbers_B if self._by_length else None
        passed = self._prefill.trace(self.params, states, hidden_BD, ids_BT, None, numbers_B, reach_B)
        seed = jax.ShapeDtypeStruct((), jnp.int32)
        return passed, self._begin.trace(self.params, states, hidden_BD, numbers_B, carry.seen_BV, seed, numbers_B)

    def _abstract_carry(self, rows):
        carry = jax.eval_shape(lambda: _empty_carry(self.lm, self.sampler, rows, self.length))
        axes = jax.tree.map(lambda leaf: ("batch", *(None,) * (leaf.ndim - 1)), carry.replace(states=None))
        return shapes(carry, axes.replace(states=models.state_axes(self.lm, carry.states)))

    def generate(self, prompts, new_tokens, seed=0, chunk=None, stop=None, first=0):
        """Yields, for each run of `chunk` steps, the new ids of each row so far (lists; what ends one is in it).

        `stop(ids) -> bool` ends a row early. The last value holds at most `new_tokens` ids a row.
        """
        carry = self.prefill(prompts, seed, first)
        at_B = np.asarray(carry.positions_B).copy()
        found, ended = [[] for _ in prompts], [new_tokens < 1] * len(prompts)
        while not all(ended):
            needed = max(len(prompt) + new_tokens - at for prompt, at in zip(prompts, at_B, strict=True))
            carry, most = self._cross(
                carry, at_B, [[*prompt, *new] for prompt, new in zip(prompts, found, strict=True)]
            )
            steps = min(chunk or needed, needed, most)
            carry, new_BS = self.decode(carry, prompts, steps)
            for row, ids in enumerate(np.asarray(new_BS).tolist()):
                for id in ids[max(0, len(prompts[row]) - at_B[row]) :]:
                    if not ended[row]:
                        found[row].append(id)
                        ended[row] = id in self.end_ids or len(found[row]) == new_tokens
                        ended[row] = ended[row] or bool(stop and stop(found[row]))
            at_B += steps
            yield [list(ids) for ids in found]

    def _cross(self, carry, at_B, rows):
        """The carry after rows that leave the length at which their keys are rotated anew, and the most steps in which
        no further one does. `rows` are the ids so far."""
        if self._switch is None:
            return carry, self.length
        leaving = [row for row, ids in enumerate(rows) if at_B[row] == self._switch == len(ids)]
        if leaving:
            carry = self._read_again(carry, leaving, [rows[row] for row in leaving])
        short = [int(at) for at, ids in zip(at_B, rows, strict=True) if at < self._switch and len(ids) <= self._switch]
        return carry, min((self._switch - at for at in short), default=self.length)

    def _read_again(self, carry, who, ids):
        """The carry with the states of rows as those of longer ones."""
        states, hidden_BD = self._empty(len(who))
        begin_B, reach_B = np.zeros(len(who), np.int32), np.full(len(who), self._switch + 1, np.int32)
        states, _ = self._prefill(self.params, states, hidden_BD, np.array(ids, np.int32), None, begin_B, reach_B)
        return self._replace(carry, states, np.array(who))


def check_prompts(prompts):
    """Raises UserError for no prompts and for an empty one."""
    if not prompts:
        raise UserError("config.infer.prompts is empty: give a text or a file")
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"config.infer.prompts: prompt {index} has no tokens; give it a text")


def _empty_carry(lm, sampler, rows, length):
    return Carry(
        logits_BV=jnp.zeros((rows, lm.vocab_size)),
        states=models.init_states(lm, rows, length),
        positions_B=jnp.zeros(rows, jnp.int32),
        done_B=jnp.zeros(rows, bool),
        seen_BV=jnp.zeros((rows, lm.vocab_size if sampler.remembers else 1), bool),
        keys_B=jax.random.split(jax.random.key(0), rows),
    )


def _empty(lm, length, rows):
    """Empty states and last hidden vectors."""
    hidden_BD = jnp.zeros((rows, lm.dim), activation_dtype(lm.precision))
    return models.pin_states(lm, models.init_states(lm, rows, length)), constrain(hidden_BD, "batch", None)


def _replace(lm, carry, states, rows_B):
    """The carry with other states of some rows."""
    put = jax.tree.map(lambda leaf, new: leaf.at[rows_B].set(new), carry.states, states)
    return carry.replace(states=models.pin_states(lm, put))


def _prefill(lm, params, states, hidden_BD, ids_BT, rows_B, at_B, reach_B):
    """The states and last hidden vectors of a batch after further tokens of some of its rows (None: all), which stand
    at `at` and will have `reach` tokens (None: nothing asks)."""
    positions_BT = at_B[:, None] + jnp.arange(ids_BT.shape[1])
    own = states if rows_B is None else jax.tree.map(lambda leaf: leaf[rows_B], states)
    ctx = Context.decoding(positions_BT, reach_B)
    x_BTD, own, _ = lm.apply({"params": params}, ids_BT, ctx, own, readout=False)
    put = (lambda leaf, new: new) if rows_B is None else (lambda leaf, new: leaf.at[rows_B].set(new))
    hidden_BD = put(hidden_BD, x_BTD[:, -1])
    return models.pin_states(lm, jax.tree.map(put, states, own)), constrain(hidden_BD, "batch", None)


def _begin(lm, params, states, hidden_BD, at_B, seen_BV, seed, numbers_B):
    """What the first step is given."""
    logits_BV = models.read_out(lm, params, hidden_BD[:, None])[:, 0]
    keys_B = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(seed), number))(numbers_B)
    return _pinned(lm, Carry(logits_BV, states, at_B, jnp.zeros(at_B.shape, bool), seen_BV, keys_B))


def _pinned(lm, carry):
    """The carry on the mesh in scope as every step takes and gives it: what is donated is then of one layout."""
    if current_mesh() is None:
        return carry
    rows = lambda leaf: constrain(leaf, "batch", *(None,) * (leaf.ndim - 1))  # noqa: E731
    states = models.pin_states(lm, carry.states)
    return jax.tree.map(rows, carry.replace(states=None)).replace(states=states)


def _decode(lm, sampler, end_ids, most, params, carry, table_BT, lengths_B, steps):
    """At most `steps` steps, no more than `most`, which is a constant of the program."""
    rows_B = jnp.arange(table_BT.shape[0])
    by_length, _ = models.depends_on_length(lm)

    def going(loop):
        index, carry, _ = loop
        return (index < steps) & ~jnp.all(carry.done_B)

    def step(loop):
        index, carry, found_BT = loop
        at_B = carry.positions_B
        chosen_B = sampler(carry.logits_BV, carry.seen_BV, jax.vmap(jax.random.fold_in)(carry.keys_B, at_B))
        in_prompt_B = at_B < lengths_B
        given_B = table_BT[rows_B, jnp.minimum(at_B, most - 1)]
        token_B = jnp.where(in_prompt_B, given_B, jnp.where(carry.done_B, end_ids[0], chosen_B))
        ctx = Context.decoding(at_B[:, None], jnp.maximum(lengths_B, at_B + 1) if by_length else None)
        logits_B1V, states, _ = lm.apply({"params": params}, token_B[:, None], ctx, carry.states)
        seen_BV = carry.seen_BV.at[rows_B, token_B].set(True) if sampler.remembers else carry.seen_BV
        done_B = carry.done_B | (~in_prompt_B & jnp.isin(token_B, jnp.array(end_ids)))
        carry = _pinned(lm, Carry(logits_B1V[:, 0], states, at_B + 1, done_B, seen_BV, carry.keys_B))
        return index + 1, carry, found_BT.at[:, index].set(token_B)

    found_BT = jnp.full((table_BT.shape[0], most), end_ids[0], jnp.int32)
    _, carry, found_BT = jax.lax.while_loop(going, step, (jnp.int32(0), carry, found_BT))
    return carry, found_BT
