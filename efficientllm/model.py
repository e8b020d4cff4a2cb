"""The language model: embeddings, a scanned pattern of blocks, a norm, logits. Every architecture is a config of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.errors import UserError, did_you_mean
from efficientllm.layers import Linear
from efficientllm.registry import build, complete
from efficientllm.sharding import constrain
from efficientllm.weights import activation_dtype, matmul


class Block(nn.Module):
    """A mixer and an ffn, each behind a norm and added to the residual stream."""

    mixer: str
    ffn: str
    norm: str

    @nn.compact
    def __call__(self, x_BTD, ctx, state):
        x_BTD = constrain(x_BTD, "batch", None, None)
        normed_BTD = build("norm", self.norm, name="mixer_norm")(x_BTD)
        y_BTD, state = build("mixer", self.mixer, name="mixer")(normed_BTD, ctx, state)
        x_BTD = x_BTD + y_BTD
        normed_BTD = build("norm", self.norm, name="ffn_norm")(x_BTD)
        y_BTD, aux = build("ffn", self.ffn, name="ffn")(normed_BTD)
        return x_BTD + y_BTD, state, aux


class Group(nn.Module):
    """One repetition of the pattern. States and aux are tuples with an entry a block."""

    blocks: tuple
    norm: str

    @nn.compact
    def __call__(self, x_BTD, ctx, states):
        out = []
        for i, (mixer, ffn) in enumerate(self.blocks):
            state = None if states is None else states[i]
            x_BTD, *rest = Block(mixer, ffn, self.norm, name=f"block_{i}")(x_BTD, ctx, state)
            out.append(rest)
        new_states, aux = zip(*out, strict=True)
        return x_BTD, (None if states is None else new_states, aux)


class LM(nn.Module):
    """A decoder-only language model.

    Args:
      blocks: the repeating pattern, pairs of complete (mixer, ffn) specs; `num_layers` is a multiple of its length.
      tied: the output projection is the embedding, transposed.
      remat: `none`, `full`, or the name of a policy of `jax.checkpoint_policies`: what the backward pass keeps.
      scan: compile one group and scan over the stacked rest; False unrolls (debugging, decoding).
    """

    blocks: tuple
    num_layers: int
    dim: int
    vocab_size: int
    norm: str
    precision: str
    tied: bool
    remat: str
    scan: bool

    @property
    def num_groups(self):
        return self.num_layers // len(self.blocks)

    @nn.compact
    def __call__(self, tokens_BT, ctx, states=None):
        """Returns float32 logits `[B, T, V]`, the new states (None without states) and aux stacked over groups."""
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        embedding_VD = self.param("embedding", init, (self.vocab_size, self.dim))
        x_BTD = _look_up(embedding_VD, tokens_BT, activation_dtype(self.precision))
        x_BTD, states, aux = self._groups(x_BTD, ctx, states)
        x_BTD = build("norm", self.norm, name="norm")(x_BTD)
        if self.tied:
            logits_BTV = matmul(x_BTD, embedding_VD.T, self.precision, out_dtype=jnp.float32)
        else:
            head = Linear(self.vocab_size, ("embed", "vocab"), self.precision, out_dtype=jnp.float32, name="head")
            logits_BTV = head(x_BTD)
        return constrain(logits_BTV, "batch", None, "vocab"), states, aux

    def _groups(self, x_BTD, ctx, states):
        group = Group if self.remat == "none" else nn.remat(Group, policy=_policy(self.remat), prevent_cse=False)
        if self.scan:
            scanned = nn.scan(
                group,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0),
                length=self.num_groups,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x_BTD, (states, aux) = scanned(self.blocks, self.norm, name="groups")(x_BTD, ctx, states)
            return x_BTD, states, aux
        out = []
        for i in range(self.num_groups):
            state = None if states is None else states[i]
            x_BTD, rest = group(self.blocks, self.norm, name=f"group_{i}")(x_BTD, ctx, state)
            out.append(rest)
        new_states, aux = zip(*out, strict=True)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *aux)
        return x_BTD, None if states is None else new_states, stacked


def _look_up(embedding_VD, tokens_BT, dtype):
    """The tokens' rows of the table, which stays where it is.

    Each device looks up its own columns for all rows of its fsdp group; an all-to-all then trades columns for rows.
    Left to itself the partitioner gathers the whole table on some meshes.
    """
    x_BTD = jnp.take(embedding_VD, constrain(tokens_BT, "group_batch", None), axis=0).astype(dtype)
    return constrain(constrain(x_BTD, "group_batch", None, "embed"), "batch", None, None)


def from_config(model, tokenizer_size=None):
    """The LM that `config.model` describes. `tokenizer_size` is needed where the size names no vocabulary.

    Raises UserError naming the key that does not fit.
    """
    size = build("size", model.size, where="config.model.size")
    build("precision", model.precision, where="config.model.precision")
    if model.remat not in ("none", "full"):
        _policy(model.remat)
    defaults = size.defaults() | {"precision": model.precision, "attention_kernel": model.attention_kernel}
    for kind in ("norm", "position"):
        defaults[kind] = complete(kind, model[kind], defaults, where=f"config.model.{kind}")
        build(kind, defaults[kind], where=f"config.model.{kind}")
    blocks = tuple(_block(entry, model.ffn, defaults) for entry in model.pattern or (model.mixer,))
    if size.num_layers % len(blocks):
        raise UserError(
            f"config.model.pattern has {len(blocks)} blocks; {size.num_layers} layers are no multiple of that"
        )
    return LM(
        blocks=blocks,
        num_layers=size.num_layers,
        dim=size.dim,
        vocab_size=_vocab_size(size, tokenizer_size),
        norm=defaults["norm"],
        precision=model.precision,
        tied=model.tied,
        remat=model.remat,
        scan=model.scan,
    )


def _block(entry, ffn, defaults):
    """`"mixer"` or `"mixer | ffn"` -> complete specs of both, each built once so that a bad one is refused here."""
    mixer, _, own_ffn = entry.partition("|")
    specs = []
    for kind, spec in (("mixer", mixer), ("ffn", own_ffn or ffn)):
        specs.append(complete(kind, spec.strip(), defaults, where=f"config.model.{kind}"))
        build(kind, specs[-1], where=f"config.model.{kind}")
    return tuple(specs)


def _vocab_size(size, tokenizer_size):
    if size.vocab_size is None:
        return tokenizer_size
    if tokenizer_size is not None and tokenizer_size > size.vocab_size:
        raise UserError(
            f"config.tokenizer has {tokenizer_size} tokens, the vocabulary of config.model.size {size.vocab_size}; "
            "choose a smaller tokenizer"
        )
    return size.vocab_size


def _policy(name):
    if name == "full":
        return None
    known = [policy for policy in dir(jax.checkpoint_policies) if policy.endswith("saveable")]  # the rest take names
    if name not in known:
        raise UserError(
            f"config.model.remat = {name!r}: no such policy; known: none, full, {', '.join(known)}"
            f"{did_you_mean(name, ['none', 'full', *known])}"
        )
    return getattr(jax.checkpoint_policies, name)


def parts(lm):
    """The unbound (mixer, ffn) of each block of the pattern."""
    return [(build("mixer", mixer), build("ffn", ffn)) for mixer, ffn in lm.blocks]


def init_states(lm, batch, length):
    """Empty states for `length` tokens of `batch` rows, in the layout `lm` takes (stacked if it scans)."""
    group = tuple(mixer.init_state(batch, length) for mixer, _ in parts(lm))
    if not lm.scan:
        return (group,) * lm.num_groups
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (lm.num_groups, *leaf.shape)), group)


def unroll(lm, params):
    """The same model with its layers apart, and its parameters: a scan would copy every layer's weights each token."""
    groups = params["groups"]
    apart = {f"group_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], groups) for i in range(lm.num_groups)}
    return lm.clone(scan=False), {key: value for key, value in params.items() if key != "groups"} | apart


def after_step(lm, params, aux):
    """Updates that no gradient makes, such as a router's balancing bias: each ffn's own rule, given its statistics."""
    for i, (_, ffn) in enumerate(parts(lm)):
        if hasattr(ffn, "after_step"):
            name = f"block_{i}"
            block = params["groups"][name]
            block = block | {"ffn": ffn.after_step(block["ffn"], aux[i]["stats"])}
            params = params | {"groups": params["groups"] | {name: block}}
    return params
