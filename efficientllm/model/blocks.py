"""Blocks: mixers and an ffn around a residual stream, groups of them, and the stacks that a model is made of."""

import typing

import flax.linen as nn
import jax

from efficientllm.ops import rematerialization as remat
from efficientllm.ops.attention import Context
from efficientllm.registry import build
from efficientllm.registry.block_entries import split_specs
from efficientllm.sharding import constrain

GROUP_INPUT = "group_input"  # the name in a memo of the residual stream before a group


class Parts(typing.NamedTuple):
    """The unbound layers of a block; the ffn is None where it has none."""

    mixers: tuple
    ffn: typing.Any

    def by_name(self) -> dict[str, typing.Any]:
        """The layers by the names of their parameters within the block; an ffn of None is not among them."""
        layers = dict(zip(mixer_names(len(self.mixers)), self.mixers, strict=True))
        return layers if self.ffn is None else layers | {"ffn": self.ffn}


def mixer_names(count: int) -> list[str]:
    """Names the mixers of a block: `mixer`, then `mixer_1` and so on, which read the same input."""
    return ["mixer" if i == 0 else f"mixer_{i}" for i in range(count)]


def build_parts(mixer: str, ffn: str) -> Parts:
    """Builds the unbound layers of a block by its specs."""
    mixers = tuple(build("mixer", spec, parent=None) for spec in split_specs(mixer))
    return Parts(mixers, build("ffn", ffn, parent=None))


class Block(nn.Module):
    """Mixers and an ffn, behind norms and added to the residual stream; or mixers alone.

    `mixer` names several mixers as `a(...) + b(...)`. They are parallel: all read the same normalized input, each
    through a modulation of its own, and all are added (the dual attention of SD3.5: `mixers/joint.py`).
    `residual`: with `sequential` the ffn reads the mixers' sum, with `parallel` the mixers' input (GPT-NeoX).
    `modulation` shifts and scales what each branch reads, and gates what it adds.
    `memo` holds arrays by name that mixers of earlier layers hand to later ones, such as RWKV-7's first values.
    """

    mixer: str
    ffn: str
    norm: str
    residual: str
    modulation: str = "plain"
    ffn_norm: str = ""

    @nn.compact
    def __call__(self, x_BTD: jax.Array, ctx: Context, states: tuple | None) -> tuple:
        x_BTD = constrain(x_BTD, "batch", "length", None)
        specs = split_specs(self.mixer)
        names = mixer_names(len(specs))
        mixers = [build("mixer", spec, name=name) for spec, name in zip(specs, names, strict=True)]
        ffn = build("ffn", self.ffn, name="ffn")
        ctx.check_order(*mixers, ffn)
        modulation = build("modulation", self.modulation, name="modulation")
        first, *others = (mixer.conditioned for mixer in mixers)
        of_mixer, of_ffn, *of_others = modulation(ctx, x_BTD.shape[-1], (first, ffn is not None, *others))
        mixer_state, ffn_state = (joined([None] * len(mixers)), None) if states is None else states
        normed_BTD = build("norm", mixers[0].block_norm or self.norm, name="mixer_norm")(x_BTD)
        before_BTD, memo, new_states = x_BTD, ctx.memo, []
        mixer_states = of_each(mixer_state, mixers)
        for mixer, affine, state in zip(mixers, (of_mixer, *of_others), mixer_states, strict=True):
            y_BTD, state, *written = _mix(mixer, affine.modulate(normed_BTD), ctx, state)
            memo = memo | written[0] if written else memo
            x_BTD = affine.add(x_BTD, y_BTD)
            new_states.append(state)
        x_BTD, mixer_state = remat.name_residual_stream(x_BTD), joined(new_states)
        if ffn is None:
            return x_BTD, memo, (mixer_state, {}), {}
        ffn_input_BTD = before_BTD if self.residual == "parallel" else x_BTD
        normed_BTD = of_ffn.modulate(build("norm", self.ffn_norm or self.norm, name="ffn_norm")(ffn_input_BTD))
        y_BTD, ffn_state, aux = ffn.in_block(normed_BTD, ctx, ffn_state)
        return of_ffn.add(x_BTD, y_BTD), memo, (mixer_state, ffn_state), aux


def _mix(mixer, x_BTD, ctx, state):
    if state is None and mixer.is_recurrent and not ctx.recomputes_recurrence:
        return remat.call_recurrent(mixer, x_BTD, ctx)
    return mixer(x_BTD, ctx, state)


def joined(states: typing.Sequence) -> typing.Any:
    """Joins what each mixer of a block has: of one mixer it is that, of several a tuple."""
    return states[0] if len(states) == 1 else tuple(states)


def of_each(state: typing.Any, mixers: typing.Sequence) -> tuple:
    """Splits what `joined` joined."""
    return (state,) if len(mixers) == 1 else tuple(state)


class Group(nn.Module):
    """One repetition of a pattern of blocks. States and aux are tuples with an entry for each block.

    `first` is the number of its first block among those of the model. A memo that has GROUP_INPUT is returned with what
    this group reads.
    """

    blocks: tuple[tuple[str, str], ...]
    norm: str
    residual: str
    modulation: str = "plain"
    ffn_norm: str = ""
    first: int = 0

    @nn.compact
    def __call__(self, carry: tuple, ctx: Context, states: tuple | None) -> tuple:
        x_BTD, memo = carry
        if GROUP_INPUT in memo:
            memo = memo | {GROUP_INPUT: x_BTD}
        results = []
        for i, (mixer, ffn) in enumerate(self.blocks):
            fields = (self.norm, self.residual, self.modulation, self.ffn_norm)
            block = Block(mixer, ffn, *fields, name=f"block_{self.first + i}")
            x_BTD, memo, *result = block(x_BTD, ctx.replace(memo=memo), None if states is None else states[i])
            results.append(result)
        new_states, aux = zip(*results, strict=True)
        return (x_BTD, memo), (None if states is None else new_states, aux)


class Stack(typing.NamedTuple):
    """A pattern of blocks that is repeated, one group after another, and scanned.

    Args:
      name: of its stacked parameters.
      blocks: numbers of its blocks among those of the model.
      groups: numbers of its groups among those of the model; there is a group for each repetition.
    """

    name: str
    blocks: range
    groups: range


class Stacks(tuple[Stack, ...]):
    """The stacks of a model, in order."""

    @classmethod
    def of(cls, blocks: int, repeats: typing.Sequence[int]) -> "Stacks":
        """Makes the stacks of a model of so many blocks: a stack of all of them for one repeat, else one of each."""
        first, stacks = 0, []
        for i, count in enumerate(repeats):
            of_stack = range(blocks) if len(repeats) == 1 else range(i, i + 1)
            stacks.append(Stack(f"groups_{i}" if i else "groups", of_stack, range(first, first + count)))
            first += count
        return cls(stacks)

    @property
    def layer_numbers(self) -> tuple[range, ...]:
        """The numbers of the layers of each block, from the first layer of the model."""
        numbers: list[range] = []
        first = 0
        for stack in self:
            step, end = len(stack.blocks), first + len(stack.blocks) * len(stack.groups)
            numbers += [range(first + i, end, step) for i in range(step)]
            first = end
        return tuple(numbers)

    def of_group(self, group: int) -> Stack:
        """Returns the stack of a group."""
        return next(stack for stack in self if group in stack.groups)

    def unrolled_paths(self, path: str) -> list[str]:
        """Returns the paths of a parameter of stacked layers in each group where they are not; of others itself."""
        name, _, rest = path.partition("/")
        groups = next((stack.groups for stack in self if stack.name == name), None)
        return [path] if groups is None else [f"group_{i}/{rest}" for i in groups]

    def stacked_path(self, path: str) -> tuple[str, tuple[int, ...]]:
        """Returns the path in stacked layers of a parameter of a group, and `(place in the stack,)`; of others `()`."""
        name, _, rest = path.partition("/")
        if not name.startswith("group_"):
            return path, ()
        group = int(name.removeprefix("group_"))
        stack = self.of_group(group)
        return f"{stack.name}/{rest}", (stack.groups.index(group),)
