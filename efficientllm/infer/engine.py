"""Generation engine: prefill of prompts of any lengths, then a compiled decode loop with a donated carry.

Rows are not padded, and each has its own positions and random key. A row's states (KV caches, rings, recurrences) and
sampled tokens are therefore the same as without the rows beside it.
"""

import functools
import typing
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from efficientllm import model as models
from efficientllm.embeds.tokens import LM
from efficientllm.errors import UserError
from efficientllm.infer import decoding
from efficientllm.infer.decoding import Carry
from efficientllm.infer.multimodal_prompts import ImageRows
from efficientllm.runtime import kernel_choice
from efficientllm.sharding import shapes
from efficientllm.typing import Params
from efficientllm.weights import activation_dtype

# XLA for GPUs would merge the products with the gate and up kernels, copying both in every pass: 38 us a layer of 1.5B
# on an H100, an eighth of the time to the first token.
NO_DOT_MERGER = {"xla_gpu_dot_merger_threshold_mb": "0"}
PREFILL_CHUNKS = (256, 64, 16)  # tokens; each size compiles a program


class Engine:
    """Generates completions with `lm` and its parameters.

    Prompts of equal length are prefilled in one pass. Those of different lengths are prefilled in PREFILL_CHUNKS, each
    for all rows with enough tokens left. The last tokens of a prompt are fed to the first steps of the decode loop,
    while rows with shorter prompts already generate.

    Args:
      lm: the model; a scanned one is unrolled, unless `in_loop`.
      sampler: an object registered as `sampler`.
      end_ids: the token or tokens that end a row; -1 for none.
      length: cache length: tokens of a prompt and its completion.
      chunked: prefill prompts of equal length in chunks too, so that many lengths need few programs.
      in_loop: decode with a loop over layers, for few tokens: the program of 4 layers compiles in 0.6 of the time and
        there is no second copy of the weights, but each token copies those of every layer.

    States are sharded on the mesh in scope like activations. Raises UserError for a `length` beyond the model's
    positions.
    """

    def __init__(
        self,
        lm: LM,
        params: Params,
        sampler: typing.Any,
        end_ids: int | Sequence[int],
        length: int,
        chunked: bool = False,
        in_loop: bool = False,
    ) -> None:
        models.check_length(lm, length, f"prompts and answers of {length} tokens")
        self.lm: LM
        self.params: Params
        if in_loop:
            self.lm, self.params = lm.clone(unroll=0), params
        else:
            self.lm, self.params = models.unroll(lm, params) if lm.scan else (lm, params)
        self.end_ids = tuple(np.atleast_1d(end_ids).tolist())
        self.sampler, self.length, self.chunked = sampler, length, chunked
        self._by_length, self._switch_length = decoding.depends_on_length(lm)
        self._empty = jax.jit(functools.partial(decoding.empty, self.lm, length), static_argnums=0)
        options = NO_DOT_MERGER if kernel_choice.platform() == "gpu" else None
        self._prefill = jax.jit(
            functools.partial(decoding.prefill, self.lm), donate_argnums=(1, 2), compiler_options=options
        )
        self._begin = jax.jit(functools.partial(decoding.begin, self.lm), donate_argnums=1)
        self._decode = jax.jit(
            functools.partial(decoding.decode, self.lm, sampler, self.end_ids, length), donate_argnums=1
        )
        self._replace = jax.jit(functools.partial(decoding.replace, self.lm), donate_argnums=0)

    @property
    def extends(self) -> bool:
        """Whether `prefill` can continue from a carry: not where RoPE scaling depends on the length of the prompt."""
        return not self._by_length

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        seed: int = 0,
        first: int = 0,
        carry: Carry | None = None,
        images: ImageRows | None = None,
    ) -> Carry:
        """Prefills `prompts` (lists of ids), up to their last whole chunks where they are chunked -> Carry.

        A row samples by `seed` and the index of its prompt; `first` is the index of the first prompt. `carry` (donated)
        continues from prefixes of the prompts, where the engine `extends`. `images` are those of the prompts, of which
        then no token is left to the decode loop. Raises UserError for an empty prompt.
        """
        check_prompts(prompts)
        rows = len(prompts)
        positions_B = np.zeros(rows, np.int32) if carry is None else np.array(carry.positions_B)
        if carry is None:
            states, hidden_BD = self._empty(rows)
        else:
            states, hidden_BD = carry.states, jnp.zeros((rows, self.lm.dim), activation_dtype(self.lm.precision))
        for indices, size in self._passes(
            [len(prompt) - position for prompt, position in zip(prompts, positions_B, strict=True)],
            PREFILL_CHUNKS if images is None else (*PREFILL_CHUNKS, 4, 1),
        ):
            ids_BT = np.array([prompts[row][positions_B[row] : positions_B[row] + size] for row in indices], np.int32)
            rows_B = None if len(indices) == rows else np.array(indices)
            reach_B = np.array([len(prompts[row]) for row in indices], np.int32) if self._by_length else None
            piece = None if images is None else images.piece(indices, positions_B[indices], size)
            states, hidden_BD = self._prefill(
                self.params, states, hidden_BD, ids_BT, rows_B, positions_B[indices], reach_B, piece
            )
            positions_B[indices] += size
        seen_BV: np.ndarray = np.zeros((rows, self.lm.vocab_size if self.sampler.remembers else 1), bool)
        if self.sampler.remembers:
            for row, prompt in enumerate(prompts):
                seen_BV[row, prompt] = True
        indices_B: np.ndarray = first + np.arange(rows)
        deltas_B = None if images is None else images.deltas_B
        return self._begin(self.params, states, hidden_BD, positions_B, seen_BV, np.int32(seed), indices_B, deltas_B)

    def _passes(self, lengths, sizes):
        """Yields `(rows, number of tokens)` of each pass of prefill, for rows with `lengths` tokens left."""
        if len(set(lengths)) == 1 and not self.chunked:
            yield list(range(len(lengths))), lengths[0]
            return
        remaining = list(lengths)
        for size in sizes:
            while rows := [row for row, count in enumerate(remaining) if count >= size]:
                yield rows, size
                for row in rows:
                    remaining[row] -= size

    def decode(self, carry: Carry, prompts: Sequence[Sequence[int]], steps: int) -> tuple[Carry, jax.Array]:
        """Decodes `steps` tokens of each row, counting remaining prompt tokens -> `(Carry, tokens int32 [B, steps])`.

        The carry is donated. The loop stops when all rows are done; tokens after a row's end are `end_ids[0]`.
        """
        prompts_BT: np.ndarray = np.zeros((len(prompts), self.length), np.int32)
        for row, prompt in enumerate(prompts):
            prompts_BT[row, : len(prompt)] = prompt
        lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
        carry, tokens_BT = self._decode(self.params, carry, prompts_BT, lengths_B, np.int32(steps))
        return carry, tokens_BT[:, :steps]

    def trace_decode(self, rows: int) -> jax.stages.Traced:
        """Traces the decode loop for `rows` rows. The parameters may be abstract, as in `trace_prefill`."""
        carry = self._abstract_carry(rows)
        prompts_BT = jax.ShapeDtypeStruct((rows, self.length), jnp.int32)
        lengths_B = jax.ShapeDtypeStruct((rows,), jnp.int32)
        return self._decode.trace(self.params, carry, prompts_BT, lengths_B, jax.ShapeDtypeStruct((), jnp.int32))

    def trace_prefill(self, rows: int, tokens: int) -> tuple[jax.stages.Traced, jax.stages.Traced]:
        """Traces prefill of `rows` prompts of `tokens` tokens -> `(the pass over the prompts, the first logits)`."""
        carry = self._abstract_carry(rows)
        _, hidden_BD = jax.eval_shape(functools.partial(decoding.empty, self.lm, self.length, rows))
        states, hidden_BD = carry.states, shapes(hidden_BD, ("batch", None))
        ids_BT, indices_B = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, tokens), (rows,)))
        reach_B = indices_B if self._by_length else None
        prefill = self._prefill.trace(self.params, states, hidden_BD, ids_BT, None, indices_B, reach_B)
        seed = jax.ShapeDtypeStruct((), jnp.int32)
        return prefill, self._begin.trace(self.params, states, hidden_BD, indices_B, carry.seen_BV, seed, indices_B)

    def _abstract_carry(self, rows):
        carry = jax.eval_shape(lambda: decoding.empty_carry(self.lm, self.sampler, rows, self.length))
        axes = jax.tree.map(lambda leaf: ("batch", *(None,) * (leaf.ndim - 1)), carry.replace(states=None))
        return shapes(carry, axes.replace(states=models.state_axes(self.lm, carry.states)))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        seed: int = 0,
        chunk: int | None = None,
        stop: Callable[[list[int]], bool] | None = None,
        first: int = 0,
        images: ImageRows | None = None,
    ) -> Iterator[list[list[int]]]:
        """Yields after every `chunk` decode steps the ids generated so far: a list a row, the end token included.

        A row ends after `new_tokens` ids, at an end token, or when `stop(ids)` is True. `first` and `images` are as in
        `prefill`.
        """
        carry = self.prefill(prompts, seed, first, images=images)
        positions_B = np.asarray(carry.positions_B).copy()
        new_ids: list[list[int]] = [[] for _ in prompts]
        ended = [new_tokens < 1] * len(prompts)
        while not all(ended):
            ends = [len(prompt) + new_tokens for prompt in prompts]
            needed = max(end - position for end, position in zip(ends, positions_B, strict=True))
            carry, limit = self.switch_rope_scaling(
                carry, positions_B, [[*prompt, *new] for prompt, new in zip(prompts, new_ids, strict=True)]
            )
            steps = min(chunk or needed, needed, limit)
            carry, new_BS = self.decode(carry, prompts, steps)
            for row, ids in enumerate(np.asarray(new_BS).tolist()):
                for id in ids[max(0, len(prompts[row]) - positions_B[row]) :]:
                    if not ended[row]:
                        new_ids[row].append(id)
                        ended[row] = id in self.end_ids or len(new_ids[row]) == new_tokens
                        ended[row] = ended[row] or bool(stop and stop(new_ids[row]))
            positions_B += steps
            yield [list(ids) for ids in new_ids]

    def switch_rope_scaling(
        self, carry: Carry, positions_B: np.ndarray, rows: Sequence[Sequence[int]]
    ) -> tuple[Carry, int]:
        """Recomputes the states of rows that grow past the length at which RoPE scaling switches (LongRoPE).

        `rows` are the ids of each row so far. Returns the carry, and the number of steps before the next row switches.
        """
        if self._switch_length is None:
            return carry, self.length
        switching = [row for row, ids in enumerate(rows) if positions_B[row] == self._switch_length == len(ids)]
        if switching:
            carry = self._prefill_again(carry, switching, [rows[row] for row in switching])
        short = [
            int(position)
            for position, ids in zip(positions_B, rows, strict=True)
            if position < self._switch_length and len(ids) <= self._switch_length
        ]
        return carry, min((self._switch_length - position for position in short), default=self.length)

    def _prefill_again(self, carry, indices, ids):
        """Replaces the states of the rows `indices` by those of rows one token longer than the switch length."""
        states, hidden_BD = self._empty(len(indices))
        begin_B, reach_B = np.zeros(len(indices), np.int32), np.full(len(indices), self._switch_length + 1, np.int32)
        states, _ = self._prefill(self.params, states, hidden_BD, np.array(ids, np.int32), None, begin_B, reach_B)
        return self._replace(carry, states, np.array(indices))


def check_prompts(prompts: Sequence[Sequence[int]]) -> None:
    """Raises UserError for an empty list of prompts, and for an empty prompt."""
    if not prompts:
        raise UserError("config.infer.prompts is empty: give a text or a file")
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"config.infer.prompts: prompt {index} has no tokens; give it a text")
