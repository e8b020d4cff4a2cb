"""The language model: embeddings, a scanned pattern of blocks, a norm, logits. Every architecture is a config of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.errors import UserError
from efficientllm.layers import Linear
from efficientllm.ops import rematerialization as remat
from efficientllm.ops.attention import Context
from efficientllm.ops.embedding_lookup import look_up
from efficientllm.registry import build, parse_spec
from efficientllm.runtime import kernel_choice
from efficientllm.sharding import constrain, current_mesh
from efficientllm.weights import Precision, matmul, parameter, transposed_kernel

HEAD = ("embed", "vocab")


class Block(nn.Module):
    """A mixer and an ffn, each behind a norm and added to the residual stream; or a mixer alone.

    `residual`: `sequential` gives the ffn what the mixer has added to, `parallel` what the mixer was given (GPT-NeoX).
    """

    mixer: str
    ffn: str
    norm: str
    residual: str

    @nn.compact
    def __call__(self, x_BTD, ctx, states):
        x_BTD = constrain(x_BTD, "batch", "length", None)
        mixer, ffn = build("mixer", self.mixer, name="mixer"), build("ffn", self.ffn, name="ffn")
        mixer_state, ffn_state = (None, None) if states is None else states
        normed_BTD = build("norm", self.norm, name="mixer_norm")(x_BTD)
        y_BTD, mixer_state, *memo = mixer(normed_BTD, ctx, mixer_state)
        memo = ctx.memo | memo[0] if memo else ctx.memo
        if ffn is None:
            return x_BTD + y_BTD, memo, (mixer_state, {}), {}
        before_BTD, x_BTD = x_BTD, x_BTD + y_BTD
        ffn_input_BTD = before_BTD if self.residual == "parallel" else x_BTD
        normed_BTD = build("norm", self.norm, name="ffn_norm")(ffn_input_BTD)
        y_BTD, ffn_state, aux = ffn.in_block(normed_BTD, ctx, ffn_state)
        return x_BTD + y_BTD, memo, (mixer_state, ffn_state), aux


class Group(nn.Module):
    """One repetition of the pattern. States and aux are tuples with an entry a block."""

    blocks: tuple
    norm: str
    residual: str

    @nn.compact
    def __call__(self, carry, ctx, states):
        x_BTD, memo = carry
        out = []
        for i, (mixer, ffn) in enumerate(self.blocks):
            block = Block(mixer, ffn, self.norm, self.residual, name=f"block_{i}")
            x_BTD, memo, *rest = block(x_BTD, ctx.replace(memo=memo), None if states is None else states[i])
            out.append(rest)
        new_states, aux = zip(*out, strict=True)
        return (x_BTD, memo), (None if states is None else new_states, aux)


class LM(nn.Module):
    """A decoder-only language model.

    What it asks of a mixer is in `mixers.base.Mixer`, and of an ffn in `ffns.base.FFN`.

    Args:
      blocks: the repeating pattern, pairs of complete (mixer, ffn) specs.
      num_layers: a block with an ffn is a layer, one without is half a layer (Gu & Dao 2023, arXiv:2312.00752,
        Appendix E.2); the pattern's layers divide it.
      tied: the output projection is the embedding, transposed.
      embed_norm: a norm follows the embedding (RWKV, BLOOM).
      remat: `none`, `full`, or the name of a policy of `jax.checkpoint_policies`: what the backward pass keeps.
        `none` is everything, on CPUs less what is cheap (`remat.kept`); `everything_saveable` is everything there too.
      scan: stack the groups' parameters and scan over them; False keeps them apart (debugging, decoding).
      unroll: a scan over at most so many groups is compiled one group after another on CPUs; 0 is always a loop.
    """

    blocks: tuple
    num_layers: int
    dim: int
    vocab_size: int
    norm: str
    position: str
    residual: str
    precision: str
    tied: bool
    embed_norm: bool
    remat: str
    scan: bool
    unroll: int

    @property
    def num_groups(self):
        return 2 * self.num_layers // half_layers(self.blocks)

    @nn.compact
    def __call__(self, tokens_BT, ctx, states=None, readout=True, groups=True):
        """Returns float32 logits `[B, T, V]`, the new states (None without states) and aux stacked over groups.

        Without `readout`, the last hidden vectors `[B, T, D]` take the logits' place. Without `groups`, returns the
        carry that the first group reads (`embed`).
        """
        precision = Precision.of(self.precision)
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        embedding_VD = parameter(self, "embedding", init, (self.vocab_size, self.dim))
        x_BTD = look_up(embedding_VD, tokens_BT, precision.activation)
        x_BTD = build("position", self.position, name="position").embed(x_BTD, ctx.positions_BT)
        if self.embed_norm:
            x_BTD = build("norm", self.norm, name="embed_norm")(x_BTD)
        carry = x_BTD, self._init_memo(*tokens_BT.shape)
        if not groups:
            return carry
        x_BTD, states, aux = self._groups(carry, ctx, states)
        x_BTD = build("norm", self.norm, name="norm")(x_BTD)
        if not readout:
            return x_BTD, states, aux
        if self.tied:
            logits_BTV = matmul(x_BTD, transposed_kernel(embedding_VD), precision, jnp.float32, HEAD)
        else:
            head = Linear(self.vocab_size, HEAD, precision, out_dtype=jnp.float32, name="head")
            logits_BTV = head(x_BTD)
        return constrain(logits_BTV, "batch", "length", "vocab"), states, aux

    def _groups(self, carry, ctx, states):
        kept = remat.kept(self.remat, [part for pair in parts(self) for part in pair], decoding=states is not None)
        group = Group if kept == remat.EVERYTHING else nn.remat(Group, policy=kept, prevent_cse=False)
        fields = (self.blocks, self.norm, self.residual)
        if self.scan:
            scanned = nn.scan(
                group,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0),
                length=self.num_groups,
                unroll=_scan_unroll(self.num_groups, self.unroll),
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            (x_BTD, _), (states, aux) = scanned(*fields, name="groups")(carry, ctx, states)
            return x_BTD, states, aux
        out = []
        for i in range(self.num_groups):
            state = None if states is None else states[i]
            carry, rest = group(*fields, name=f"group_{i}")(carry, ctx, state)
            out.append(rest)
        new_states, aux = zip(*out, strict=True)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *aux)
        return carry[0], None if states is None else new_states, stacked

    def _init_memo(self, batch, length):
        memo = {}
        for mixer, _ in parts(self):
            memo |= mixer.init_memo(batch, length, self.dim)
        return memo


def _scan_unroll(num_groups, most):
    """How many turns of the scan over groups are compiled one after another, where `most` may be.

    Measured on CPUs: a loop costs 8 to 20 % of a step, for it copies all that its backward pass keeps, while compiling
    8 layers apart takes no longer.
    """
    return num_groups if kernel_choice.platform() == "cpu" and num_groups <= most else 1


def half_layers(blocks):
    """Half layers in a pattern: two a block, one where it has no ffn."""
    return sum(1 if build("ffn", ffn, parent=None) is None else 2 for _, ffn in blocks)


def parts(lm):
    """The unbound (mixer, ffn) of each block of the pattern; None where it has no ffn."""
    return [(build("mixer", mixer, parent=None), build("ffn", ffn, parent=None)) for mixer, ffn in lm.blocks]


def init_states(lm, batch, length):
    """Empty states for `length` tokens of `batch` rows, in the layout `lm` takes (stacked if it scans).

    A block's is the pair of its mixer's and its ffn's. Raises UserError for more tokens than the position has.
    """
    check_length(lm, length)
    group = tuple(
        (mixer.init_state(batch, length), {} if ffn is None else ffn.init_state(batch, length))
        for mixer, ffn in parts(lm)
    )
    if not lm.scan:
        return (group,) * lm.num_groups
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (lm.num_groups, *leaf.shape)), group)


def pin_states(lm, states):
    """States laid out over the mesh in scope, as `state_axes` says."""
    if current_mesh() is None:
        return states
    return jax.tree.map(lambda leaf, axes: constrain(leaf, *axes), states, state_axes(lm, states))


def state_axes(lm, states):
    """The logical axes of every leaf of states, as tuples: rows as those of a batch, the rest as each part's
    `state_axes` says, `{name of a leaf: logical axes behind the rows}`; what it does not name is whole on each device.
    """

    def of(part, state):
        known = {} if part is None else part.state_axes

        def one(keys, leaf):
            name = next((key.key for key in reversed(keys) if isinstance(key, jax.tree_util.DictKey)), None)
            axes = (*(None,) * lm.scan, "batch", *known.get(name, ()))
            return *axes, *(None,) * (leaf.ndim - len(axes))

        return jax.tree_util.tree_map_with_path(one, state)

    def group(state):
        return tuple(tuple(map(of, *pair)) for pair in zip(parts(lm), state, strict=True))

    return group(states) if lm.scan else tuple(map(group, states))


def abstract_params(lm):
    """The parameters' shapes, boxed with their logical axes; no array is made."""
    return jax.eval_shape(lambda: init_params(lm, jax.random.key(0), 8))


def init_params(lm, key, length):
    """The initial parameters, boxed with their logical axes; traced for one row of `length` tokens.

    One that its module made without them, by a plain `self.param`, is whole on every device. Raises UserError where
    there are more or fewer axes than dimensions.
    """
    tokens_BT = jnp.zeros((1, length), jnp.int32)
    params = lm.init(key, tokens_BT, Context.packed(tokens_BT))["params"]
    return jax.tree_util.tree_map_with_path(_boxed, params, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


def _boxed(keys, leaf):
    value, names = (leaf.value, tuple(leaf.names)) if isinstance(leaf, nn.Partitioned) else (leaf, (None,) * leaf.ndim)
    if len(names) != value.ndim:
        path = "/".join(key.key for key in keys)
        raise UserError(f"parameter {path} of shape {value.shape}: {len(names)} logical axes are named, {names}")
    return nn.LogicallyPartitioned(value, names)


def embed(lm, params, tokens_BT, ctx):
    """The carry of the first group, `(x_BTD, memo)`: embedded tokens, and what mixers find in `ctx.memo`."""
    return lm.apply({"params": params}, tokens_BT, ctx, groups=False)


def apply_group(lm, params, carry, ctx):
    """The carry after one group of layers; `params` are the group's own, of a model that is not scanned."""
    return Group(lm.blocks, lm.norm, lm.residual).apply({"params": params}, carry, ctx, None)[0]


def head_kernel(lm, params):
    """The output projection `[D, V]`."""
    return transposed_kernel(params["embedding"]) if lm.tied else params["head"]["kernel"]


def read_out(lm, params, x_BTD):
    """Float32 logits `[B, T, V]` of what the model gives without `readout`."""
    return matmul(x_BTD, head_kernel(lm, params), lm.precision, jnp.float32, HEAD)


def check_length(lm, length, where="a state"):
    """Raises UserError for a row of `length` tokens where the position has fewer; `where` says what asks for them."""
    most = build("position", lm.position).max_positions
    if most is not None and length > most:
        raise UserError(
            f"{where}: {length} tokens, but config.model.position = {lm.position!r} has {most} positions; "
            f"give it {length}, or take {most} tokens at most"
        )


def depends_on_length(lm):
    """`(whether rotations depend on how many tokens a row has, the length beyond which keys are rotated anew or None)`.

    They are those of the first position that says so, of the mixers' own.
    """
    specs = [parse_spec(mixer)[1].get("position") for mixer, _ in lm.blocks]
    positions = [build("position", spec, parent=None) for spec in dict.fromkeys(specs) if spec]
    by_length = [position for position in positions if position.by_length]
    return bool(by_length), next((position.switches_at for position in by_length), None)


def unroll(lm, params):
    """The same model with its layers apart, and its parameters: a scan would copy every layer's weights each token."""
    groups = params["groups"]
    apart = {f"group_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], groups) for i in range(lm.num_groups)}
    return lm.clone(scan=False), {key: value for key, value in params.items() if key != "groups"} | apart


def after_step(lm, params, aux):
    """Updates that no gradient makes, such as a router's balancing bias: each ffn's own rule, given its statistics."""
    rules = {f"block_{i}": (ffn, aux[i]) for i, (_, ffn) in enumerate(parts(lm)) if "stats" in aux[i]}

    def group(blocks, index=...):
        stats = {name: jax.tree.map(lambda leaf: leaf[index], aux["stats"]) for name, (_, aux) in rules.items()}
        after = {name: ffn.after_step(blocks[name]["ffn"], stats[name]) for name, (ffn, _) in rules.items()}
        return blocks | {name: blocks[name] | {"ffn": leaves} for name, leaves in after.items()}

    if not rules:
        return params
    if lm.scan:
        return params | {"groups": group(params["groups"])}
    return params | {f"group_{i}": group(params[f"group_{i}"], i) for i in range(lm.num_groups)}
