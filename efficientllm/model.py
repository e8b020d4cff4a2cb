"""Language model: an embedding, a scanned pattern of blocks, a norm, logits. Every architecture is a config of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.errors import UserError
from efficientllm.layers import Linear
from efficientllm.ops import rematerialization as remat
from efficientllm.ops.attention import Context
from efficientllm.ops.embedding_lookup import look_up
from efficientllm.registry import build, parse_spec
from efficientllm.sharding import constrain, current_mesh
from efficientllm.typing import Params, PyTree
from efficientllm.weights import Precision, Weight, matmul, parameter, transposed_kernel

HEAD = ("embed", "vocab")


class Block(nn.Module):
    """A mixer and an ffn, each behind a norm and added to the residual stream; or a mixer alone.

    `residual`: with `sequential` the ffn reads the mixer's sum, with `parallel` the mixer's input (GPT-NeoX).
    `memo` holds arrays by name that mixers of earlier layers hand to later ones, such as RWKV-7's first values.
    """

    mixer: str
    ffn: str
    norm: str
    residual: str

    @nn.compact
    def __call__(self, x_BTD: jax.Array, ctx: Context, states: tuple | None) -> tuple:
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
    """One repetition of the pattern of blocks. States and aux are tuples with an entry for each block."""

    blocks: tuple[tuple[str, str], ...]
    norm: str
    residual: str

    @nn.compact
    def __call__(self, carry: tuple, ctx: Context, states: tuple | None) -> tuple:
        x_BTD, memo = carry
        results = []
        for i, (mixer, ffn) in enumerate(self.blocks):
            block = Block(mixer, ffn, self.norm, self.residual, name=f"block_{i}")
            x_BTD, memo, *result = block(x_BTD, ctx.replace(memo=memo), None if states is None else states[i])
            results.append(result)
        new_states, aux = zip(*results, strict=True)
        return (x_BTD, memo), (None if states is None else new_states, aux)


class LM(nn.Module):
    """A decoder-only language model; `mixers.base.Mixer` and `ffns.base.FFN` are the protocols of its blocks' modules.

    Args:
      blocks: the repeating pattern, pairs of complete (mixer, ffn) specs.
      num_layers: a multiple of the pattern's; a block without an ffn is half a layer (arXiv:2312.00752, Appendix E.2).
      tied: the output projection is the embedding, transposed.
      embed_norm: a norm follows the embedding (RWKV, BLOOM).
      remat: `none`, `full`, or a policy of `jax.checkpoint_policies`: the residuals saved for the backward pass.
        `none` saves everything, on CPUs all but cheap results (`remat.kept`); `everything_saveable` saves those too.
      scan: stack the groups' parameters and scan over them; False keeps them separate (debugging, decoding).
      unroll: a scan over at most so many groups is unrolled on CPUs; 0 is always a loop.
    """

    blocks: tuple[tuple[str, str], ...]
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
    def num_groups(self) -> int:
        return 2 * self.num_layers // half_layers(self.blocks)

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        ctx: Context,
        states: PyTree | None = None,
        readout: bool = True,
        groups: bool = True,
    ) -> tuple:
        """Returns float32 logits `[B, T, V]`, the new states (None without states) and aux stacked over groups.

        Without `readout` the last hidden vectors `[B, T, D]` stand in place of the logits. Without `groups` the result
        is the carry of the first group (`embed`).
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
        modules = [module for pair in parts(self) for module in pair]
        policy = remat.kept(self.remat, modules, decoding=states is not None)
        group = Group if policy == remat.EVERYTHING else nn.remat(Group, policy=policy, prevent_cse=False)
        fields = (self.blocks, self.norm, self.residual)
        if self.scan:
            scanned = nn.scan(
                group,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0),
                length=self.num_groups,
                unroll=remat.scan_unroll(self.num_groups, self.unroll),
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            (x_BTD, _), (states, aux) = scanned(*fields, name="groups")(carry, ctx, states)
            return x_BTD, states, aux
        results = []
        for i in range(self.num_groups):
            carry, result = group(*fields, name=f"group_{i}")(carry, ctx, None if states is None else states[i])
            results.append(result)
        new_states, aux = zip(*results, strict=True)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *aux)
        return carry[0], None if states is None else new_states, stacked

    def _init_memo(self, batch, length):
        memo = {}
        for mixer, _ in parts(self):
            memo |= mixer.init_memo(batch, length, self.dim)
        return memo


def half_layers(blocks: tuple[tuple[str, str], ...]) -> int:
    """Counts half layers in a pattern: two for each block, one where it has no ffn."""
    return sum(1 if build("ffn", ffn, parent=None) is None else 2 for _, ffn in blocks)


def parts(lm: LM) -> list[tuple]:
    """Builds the unbound (mixer, ffn) of each block of the pattern; the ffn is None where it has none."""
    return [(build("mixer", mixer, parent=None), build("ffn", ffn, parent=None)) for mixer, ffn in lm.blocks]


def init_states(lm: LM, batch: int, length: int) -> PyTree:
    """Makes empty states for `length` tokens of `batch` rows, stacked over groups if `lm` scans.

    A block's state is the pair of its mixer's and its ffn's. Raises UserError for more tokens than the position has.
    """
    check_length(lm, length)
    group = tuple(
        (mixer.init_state(batch, length), {} if ffn is None else ffn.init_state(batch, length))
        for mixer, ffn in parts(lm)
    )
    if not lm.scan:
        return (group,) * lm.num_groups
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (lm.num_groups, *leaf.shape)), group)


def pin_states(lm: LM, states: PyTree) -> PyTree:
    """Constrains states to their sharding over the mesh in scope; see `state_axes`."""
    if current_mesh() is None:
        return states
    return jax.tree.map(lambda leaf, axes: constrain(leaf, *axes), states, state_axes(lm, states))


def state_axes(lm: LM, states: PyTree) -> PyTree:
    """Returns the logical axes of every leaf of states: the batch's rows, then those in its module's `state_axes`."""

    def module_axes(module, state):
        axes_of = {} if module is None else module.state_axes

        def leaf_axes(keys, leaf):
            name = next((key.key for key in reversed(keys) if isinstance(key, jax.tree_util.DictKey)), None)
            axes = (*(None,) * lm.scan, "batch", *axes_of.get(name, ()))
            return *axes, *(None,) * (leaf.ndim - len(axes))

        return jax.tree_util.tree_map_with_path(leaf_axes, state)

    def group(state):
        return tuple(tuple(map(module_axes, *pair)) for pair in zip(parts(lm), state, strict=True))

    return group(states) if lm.scan else tuple(map(group, states))


def abstract_params(lm: LM) -> Params:
    """Returns the parameters' shapes, boxed with their logical axes; makes no array."""
    return jax.eval_shape(lambda: init_params(lm, jax.random.key(0), 8))


def init_params(lm: LM, key: jax.Array, length: int) -> Params:
    """Initializes the parameters, boxed with their logical axes; traced for one row of `length` tokens.

    A parameter without axes (a plain `self.param`) is replicated. Raises UserError where there are more or fewer axes
    than dimensions.
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


def embed(lm: LM, params: Params, tokens_BT: jax.Array, ctx: Context) -> tuple:
    """Returns the carry of the first group, `(x_BTD, memo)`: embedded tokens, and what mixers find in `ctx.memo`."""
    return lm.apply({"params": params}, tokens_BT, ctx, groups=False)


def apply_group(lm: LM, params: Params, carry: tuple, ctx: Context) -> tuple:
    """Returns the carry after one group of layers; `params` are that group's, of a model that is not scanned."""
    return Group(lm.blocks, lm.norm, lm.residual).apply({"params": params}, carry, ctx, None)[0]


def head_kernel(lm: LM, params: Params) -> jax.Array | Weight:
    """Returns the output projection `[D, V]`."""
    return transposed_kernel(params["embedding"]) if lm.tied else params["head"]["kernel"]


def read_out(lm: LM, params: Params, x_BTD: jax.Array) -> jax.Array:
    """Computes float32 logits `[B, T, V]` from last hidden vectors, the model's output without `readout`."""
    return matmul(x_BTD, head_kernel(lm, params), lm.precision, jnp.float32, HEAD)


def check_length(lm: LM, length: int, where: str = "a state") -> None:
    """Raises UserError for a row of `length` tokens where the position has fewer; `where` says what asks for them."""
    most = build("position", lm.position).max_positions
    if most is not None and length > most:
        raise UserError(
            f"{where}: {length} tokens, but config.model.position = {lm.position!r} has {most} positions; "
            f"give it {length}, or take {most} tokens at most"
        )


def depends_on_length(lm: LM) -> tuple[bool, int | None]:
    """Returns `(whether rotations depend on a row's length, the first length beyond which keys are rotated anew)`."""
    specs = [parse_spec(mixer)[1].get("position") for mixer, _ in lm.blocks]
    positions = [build("position", spec, parent=None) for spec in dict.fromkeys(specs) if spec]
    by_length = [position for position in positions if position.by_length]
    return bool(by_length), next((position.switches_at for position in by_length), None)


def unroll(lm: LM, params: Params) -> tuple[LM, Params]:
    """Unstacks the layers of a scanned model for decoding: a scan would copy every layer's weights at each token."""
    groups = params["groups"]
    layers = {f"group_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], groups) for i in range(lm.num_groups)}
    return lm.clone(scan=False), {key: value for key, value in params.items() if key != "groups"} | layers


def after_step(lm: LM, params: Params, aux: tuple) -> Params:
    """Updates parameters without a gradient, such as a router's balancing bias: each ffn's rule on its statistics."""
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
