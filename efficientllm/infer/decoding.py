"""Pure functions of generation, which the engine compiles: empty carry, prefill, first logits, decode loop."""

import typing

import flax.struct
import jax
import jax.numpy as jnp

from efficientllm import model as models
from efficientllm.embeds.tokens import LM, read_out
from efficientllm.embeds.vision_tower import Images
from efficientllm.infer.multimodal_prompts import ImageRows
from efficientllm.model import Backbone
from efficientllm.ops.attention import Context
from efficientllm.registry import build, parse_spec
from efficientllm.registry.block_entries import split_specs
from efficientllm.sharding import constrain, current_mesh
from efficientllm.typing import Params, PyTree
from efficientllm.weights import activation_dtype


@flax.struct.dataclass
class Carry:
    """Carry of the decode loop.

    logits_BV:    of the next token.
    states:       decode states of all blocks, such as KV caches.
    positions_B:  of the next token.
    done_B:       rows that have generated an end token.
    seen_BV:      tokens that a row contains; one column if the sampler does not `remember` them.
    keys_B:       a random key a row.
    deltas_B:     what is added to a position for the coordinates of a token (M-RoPE); None where they are the position.
    """

    logits_BV: jax.Array
    states: tuple
    positions_B: jax.Array
    done_B: jax.Array
    seen_BV: jax.Array
    keys_B: jax.Array
    deltas_B: jax.Array | None = None


def depends_on_length(lm: Backbone) -> tuple[bool, int | None]:
    """Returns `(whether rotations depend on a row's length, the first length beyond which keys are rotated anew)`."""
    mixers = [spec for mixer, _ in lm.blocks for spec in split_specs(mixer)]
    specs = [parse_spec(mixer)[1].get("position") for mixer in mixers]
    positions = [build("position", spec, parent=None) for spec in dict.fromkeys(specs) if spec]
    by_length = [position for position in positions if position.by_length]
    return bool(by_length), next((position.switches_at for position in by_length), None)


def empty_carry(lm: LM, sampler: typing.Any, rows: int, length: int) -> Carry:
    """A carry of `rows` rows without a token."""
    return Carry(
        logits_BV=jnp.zeros((rows, lm.vocab_size)),
        states=models.init_states(lm, rows, length),
        positions_B=jnp.zeros(rows, jnp.int32),
        done_B=jnp.zeros(rows, bool),
        seen_BV=jnp.zeros((rows, lm.vocab_size if sampler.remembers else 1), bool),
        keys_B=jax.random.split(jax.random.key(0), rows),
    )


def empty(lm: LM, length: int, rows: int) -> tuple[PyTree, jax.Array]:
    """Empty states, and zeros for the last hidden vectors."""
    hidden_BD = jnp.zeros((rows, lm.dim), activation_dtype(lm.precision))
    return models.pin_states(lm, models.init_states(lm, rows, length)), constrain(hidden_BD, "batch", None)


def replace(lm: LM, carry: Carry, states: PyTree, rows_B: jax.Array) -> Carry:
    """Replaces the states of the rows `rows_B`."""
    rows = _rows(lm, rows_B)
    replaced = jax.tree.map(lambda leaf, new: leaf.at[rows].set(new), carry.states, states)
    return carry.replace(states=models.pin_states(lm, replaced))  # type: ignore[attr-defined]


def _rows(lm, rows_B):
    """The index of rows in the states of a model, which begin with the layers where it scans them."""
    return (slice(None), rows_B) if lm.scan else rows_B


def prefill(
    lm: LM,
    params: Params,
    states: PyTree,
    hidden_BD: jax.Array,
    ids_BT: jax.Array,
    rows_B: jax.Array | None,
    at_B: jax.Array,
    reach_B: jax.Array | None,
    images: ImageRows | None = None,
) -> tuple[PyTree, jax.Array]:
    """Feeds `ids_BT` to the rows `rows_B` (None: all) -> `(states, last hidden vectors)` of the whole batch.

    The first token of a row has the position `at_B`. `reach_B` is the final length of its prompt, by which some RoPE
    scalings choose their frequencies; None where the model does not need it. `images` are those of these tokens.
    """
    positions_BT = at_B[:, None] + jnp.arange(ids_BT.shape[1])
    rows = _rows(lm, rows_B)
    row_states = states if rows_B is None else jax.tree.map(lambda leaf: leaf[rows], states)
    ctx = Context.decoding(positions_BT, reach_B)
    if images is not None:
        of_tokens = Images(images.slots_BL, features_BMD=images.features_BMD)
        ctx = ctx.replace(coordinates_BTA=images.coordinates_BLA, images=of_tokens)
    x_BTD, row_states, _ = lm.apply({"params": params}, ids_BT, ctx, row_states, readout=False)
    if rows_B is None:
        states, hidden_BD = row_states, x_BTD[:, -1]
    else:
        states = jax.tree.map(lambda leaf, new: leaf.at[rows].set(new), states, row_states)
        hidden_BD = hidden_BD.at[rows_B].set(x_BTD[:, -1])
    return models.pin_states(lm, states), constrain(hidden_BD, "batch", None)


def begin(
    lm: LM,
    params: Params,
    states: PyTree,
    hidden_BD: jax.Array,
    at_B: jax.Array,
    seen_BV: jax.Array,
    seed: jax.Array,
    indices_B: jax.Array,
    deltas_B: jax.Array | None = None,
) -> Carry:
    """The carry of the first decode step."""
    logits_BV = read_out(lm, params, hidden_BD[:, None])[:, 0]
    keys_B = jax.vmap(lambda index: jax.random.fold_in(jax.random.key(seed), index))(indices_B)
    done_B = jnp.zeros(at_B.shape, bool)
    return constrain_carry(lm, Carry(logits_BV, states, at_B, done_B, seen_BV, keys_B, deltas_B))


def constrain_carry(lm: LM, carry: Carry) -> Carry:
    """Constrains the carry to the same shardings at every step, so that it can be donated."""
    if current_mesh() is None:
        return carry

    def constrain_rows(leaf):
        return constrain(leaf, "batch", *(None,) * (leaf.ndim - 1))

    states = models.pin_states(lm, carry.states)
    return jax.tree.map(constrain_rows, carry.replace(states=None)).replace(states=states)  # type: ignore[attr-defined]


def decode(
    lm: LM,
    sampler: typing.Any,
    end_ids: tuple[int, ...],
    length: int,
    params: Params,
    carry: Carry,
    prompts_BT: jax.Array,
    lengths_B: jax.Array,
    steps: jax.Array,
) -> tuple[Carry, jax.Array]:
    """The decode loop: at most `steps` steps. `length`, the cache length, is static."""
    rows_B = jnp.arange(prompts_BT.shape[0])
    by_length, _ = depends_on_length(lm)

    def unfinished(loop):
        index, carry, _ = loop
        return (index < steps) & ~jnp.all(carry.done_B)

    def step(loop):
        index, carry, tokens_BT = loop
        positions_B = carry.positions_B
        sampled_B = sampler(carry.logits_BV, carry.seen_BV, jax.vmap(jax.random.fold_in)(carry.keys_B, positions_B))
        in_prompt_B = positions_B < lengths_B
        prompt_token_B = prompts_BT[rows_B, jnp.minimum(positions_B, length - 1)]
        token_B = jnp.where(in_prompt_B, prompt_token_B, jnp.where(carry.done_B, end_ids[0], sampled_B))
        ctx = Context.decoding(positions_B[:, None], jnp.maximum(lengths_B, positions_B + 1) if by_length else None)
        if carry.deltas_B is not None:
            ctx = ctx.replace(coordinates_BTA=_coordinates(lm, positions_B + carry.deltas_B))
        logits_B1V, states, _ = lm.apply({"params": params}, token_B[:, None], ctx, carry.states)
        seen_BV = carry.seen_BV.at[rows_B, token_B].set(True) if sampler.remembers else carry.seen_BV
        done_B = carry.done_B | (~in_prompt_B & jnp.isin(token_B, jnp.array(end_ids)))
        fields = (logits_B1V[:, 0], states, positions_B + 1, done_B, seen_BV, carry.keys_B, carry.deltas_B)
        carry = constrain_carry(lm, Carry(*fields))
        return index + 1, carry, tokens_BT.at[:, index].set(token_B)

    tokens_BT = jnp.full((prompts_BT.shape[0], length), end_ids[0], jnp.int32)
    _, carry, tokens_BT = jax.lax.while_loop(unfinished, step, (jnp.int32(0), carry, tokens_BT))
    return carry, tokens_BT


def _coordinates(lm, positions_B):
    """The coordinates of one text token a row, `[B, 1, A]`: the same on all axes of the model's position."""
    axes = build("position", lm.position, parent=None).axes
    return jnp.broadcast_to(positions_B[:, None, None], (*positions_B.shape, 1, axes)) if axes > 1 else None
