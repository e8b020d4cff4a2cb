"""Backbone: scanned patterns of blocks between the ends of `embeds`. Every architecture is a config of it."""

import dataclasses
import functools
import math
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.mixers.base import Mixer
from efficientllm.model.blocks import Group, Parts, Stack, Stacks, build_parts
from efficientllm.ops import rematerialization as remat
from efficientllm.ops.attention import Context
from efficientllm.registry import build
from efficientllm.typing import Params, PyTree


class Backbone(nn.Module):
    """Blocks between the ends of a model; `mixers.base.Mixer` and `ffns.base.FFN` are the protocols of their modules.

    A subclass has the ends (`embeds.tokens.LM`, `embeds.patches.Denoiser`): its `__call__` embeds an input, calls
    `apply_blocks` and reads out.

    Args:
      blocks: the repeating pattern, pairs of complete (mixer, ffn) specs; several parallel mixers are joined by ` + `.
      num_layers: a multiple of the pattern's; a block without an ffn is half a layer (arXiv:2312.00752, Appendix E.2).
      remat: `none`, `full`, or a policy of `jax.checkpoint_policies`: the residuals saved for the backward pass.
        `none` saves everything, on one CPU or GPU all but cheap results (`remat.residual_policy`);
        `everything_saveable` saves those too.
      scan: stack the groups' parameters and scan over them; False keeps them separate (debugging, decoding).
      unroll: a scan over at most so many groups is unrolled on CPUs, on one GPU over more; 0 is always a loop
        (`remat.scan_unroll`).
      modulation: the `modulation` of every block.
      ffn_norm: the norm before an ffn where it is another than `norm`.
      repeats: how often each block is repeated before the next one begins; () repeats all blocks together.
    """

    blocks: tuple[tuple[str, str], ...]
    num_layers: int
    dim: int
    norm: str
    position: str
    residual: str
    precision: str
    remat: str
    scan: bool
    unroll: int
    modulation: str = dataclasses.field(default="plain", kw_only=True)
    ffn_norm: str = dataclasses.field(default="", kw_only=True)
    repeats: tuple[int, ...] = dataclasses.field(default=(), kw_only=True)

    # The order in which tokens see each other (`ops.attention.Mask.order`).
    order: typing.ClassVar[str] = "causal"
    # What it reads, the `modality` of data sources and objectives: "text", "images".
    reads: typing.ClassVar[str]
    # First names of the parameters behind the blocks: a gradient reaches them where no block is trainable.
    behind_blocks: typing.ClassVar[tuple[str, ...]] = ("norm", "head")

    @property
    def stacks(self) -> Stacks:
        """The stacks of layers, in order."""
        return Stacks.of(len(self.blocks), self.repeats or (2 * self.num_layers // half_layers(self.blocks),))

    @property
    def is_recurrent(self) -> bool:
        """Whether a mixer of any block is a recurrence."""
        return any(mixer.is_recurrent for block in parts(self) for mixer in block.mixers)

    @property
    def num_groups(self) -> int:
        return sum(len(stack.groups) for stack in self.stacks)

    def shallow(self) -> "Backbone":
        """Returns the model with one group of each stack; with two where a group has half a layer."""
        if self.repeats:
            return self.clone(repeats=(1,) * len(self.blocks), num_layers=half_layers(self.blocks) // 2)
        return self.clone(num_layers=math.lcm(half_layers(self.blocks), 2) // 2)

    def group_fields(self, stack: Stack) -> tuple:
        """The arguments of `Group` for the groups of a stack."""
        blocks = tuple(self.blocks[i] for i in stack.blocks)
        return blocks, self.norm, self.residual, self.modulation, self.ffn_norm, stack.blocks.start

    def example(self, length: int) -> tuple:
        """Returns arguments of `__call__` for one row of `length` tokens, by which parameters are made."""
        raise NotImplementedError(f"{type(self).__name__} defines no example(length)")

    def row_length(self, length: int) -> int:
        """Returns the tokens of a row, where the config asks for `length`."""
        return length

    def patch_side(self) -> int:
        """Returns the side of the patches that an end reads and writes, 0 for none."""
        return 0

    def token_side(self) -> int:
        """Returns what each side of a picture is a multiple of, in pixels or in those of latents."""
        return 1

    def kernel_rows(self, path: str, length: int) -> int:
        """Counts the rows that the kernel of an end at `path` multiplies for a row of `length` tokens."""
        return length

    def mix_flops(self, mixer: Mixer, length: int, executed: bool = False) -> float:
        """Counts `Mixer.mix_flops` of a row of `length` tokens in the model's order."""
        order = {} if self.order == "causal" else {"order": self.order}
        return mixer.mix_flops(length, executed, **order)

    def has_input_gradient(self, path: str, trains: typing.Callable[[str], bool]) -> bool:
        """Whether the input of an end's kernel has a gradient; `trains(path)` says which parameters are trainable."""
        return True

    def part_of(self, path: str) -> str:
        """Names the part of the model that the parameter at `path` belongs to, for a table of trainable parameters."""
        return "model"

    def branches(self) -> dict[str, tuple["Backbone", int]]:
        """Returns backbones beside the blocks that a row goes through, `{prefix of its paths: (it, its tokens)}`."""
        return {}

    # Tokens of the states that it reads of a text; 0 reads none.
    text_length = 0
    # First names of parameters that a checkpoint of the model's kind without them can be given.
    new_parts: typing.ClassVar[tuple[str, ...]] = ()

    # Kernels of the ends, by their paths, that multiply the condition of a request alone (`request_states`).
    request_kernels: typing.ClassVar[tuple[str, ...]] = ()

    def layer_of(self, path: str) -> typing.Any:
        """Returns the unbound mixer or ffn that a parameter belongs to; None for parameters of others."""
        names = path.split("/")
        block = next((name for name in names if name.startswith("block_")), None)
        if block is None:
            return None
        built = build_parts(*self.blocks[int(block.removeprefix("block_"))])
        return built.by_name().get(names[names.index(block) + 1])

    def is_of_request(self, path: str) -> bool:
        """Whether the kernel at `path` multiplies the condition of a request alone, once for all steps of a sampler."""
        layer, owner = self.layer_of(path), path.removesuffix("/kernel")
        if layer is None:
            return owner in self.request_kernels
        return isinstance(layer, Mixer) and owner.rpartition("/")[2] in layer.request_kernels

    def shared_head_flops(self, length: int) -> float:
        """Counts the forward FLOPs of an end whose kernel is another parameter, such as a tied head."""
        return 0

    def apply_blocks(self, carry: tuple, ctx: Context, states: PyTree | None) -> tuple:
        """Applies all blocks to `(x_BTD, memo)`; returns `(x_BTD, states, aux)`. Call it in a compact method."""
        (x_BTD, _), states, aux = self.apply_groups(carry, ctx, states)
        return x_BTD, states, aux

    def apply_groups(self, carry: tuple, ctx: Context, states: PyTree | None) -> tuple:
        """Applies all blocks to `(x_BTD, memo)`; returns `((x_BTD, memo), states, aux)`. See `apply_blocks`."""
        modules = [layer for block in parts(self) for layer in (*block.mixers, block.ffn)]
        apply_stack = self._scan_stack if self.scan else self._unroll_stack
        new_states: tuple = ()
        aux: tuple = ()
        for stack in self.stacks:
            policy = self._residual_policy(stack, modules, decoding=states is not None)
            group = self._group_class(stack, policy)
            ctx = ctx.replace(recomputes_recurrence=policy == remat.save_products)
            of_stack = stack.blocks if self.scan else stack.groups
            stack_states = None if states is None else tuple(states[i] for i in of_stack)
            carry, (stack_states, stack_aux) = apply_stack(stack, group, carry, ctx, stack_states)
            aux += stack_aux
            new_states += () if stack_states is None else stack_states
        return carry, None if states is None else new_states, aux

    def _residual_policy(self, stack, modules, decoding):
        return remat.residual_policy(self.remat, modules, decoding, self._is_loop(stack))

    def _group_class(self, stack, policy):
        """Group, with what the policy of `remat` saves for the backward pass."""
        if policy == remat.EVERYTHING:
            return Group
        return nn.remat(Group, policy=policy, prevent_cse=not self._is_loop(stack))

    def _is_loop(self, stack):
        return self.scan and remat.scan_unroll(len(stack.groups), self.unroll) < len(stack.groups)

    def _scan_stack(self, stack, group, carry, ctx, states):
        scanned = nn.scan(
            group,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),
            length=len(stack.groups),
            unroll=remat.scan_unroll(len(stack.groups), self.unroll),
            metadata_params={nn.PARTITION_NAME: "layers"},
            # Traces the group once more, for constants that it has not. Random keys follow from it in initialization.
            check_constancy_invariants=self.is_initializing(),
        )
        return scanned(*self.group_fields(stack), name=stack.name)(carry, ctx, states)

    def _unroll_stack(self, stack, group, carry, ctx, states):
        results = []
        for i, number in enumerate(stack.groups):
            of_group = group(*self.group_fields(stack), name=f"group_{number}")
            carry, result = of_group(carry, ctx, None if states is None else states[i])
            results.append(result)
        new_states, aux = zip(*results, strict=True)
        return carry, (None if states is None else new_states, jax.tree.map(lambda *leaves: jnp.stack(leaves), *aux))

    def init_memo(self, batch: int, length: int, position: typing.Any = None) -> dict[str, jax.Array]:
        """Returns the `ctx.memo` of the first layer; `position` is the model's."""
        mixers = [mixer for block in parts(self) for mixer in block.mixers]
        memo = {} if position is None else position.init_memo([mixer.head_counts()[0] for mixer in mixers])
        for mixer in mixers:
            memo |= mixer.init_memo(batch, length, self.dim)
        return memo


@functools.lru_cache
def half_layers(blocks: tuple[tuple[str, str], ...]) -> int:
    """Counts half layers in a pattern: two for each block, one where it has no ffn."""
    return sum(1 if build("ffn", ffn, parent=None) is None else 2 for _, ffn in blocks)


def parts(lm: Backbone) -> list[Parts]:
    """Builds the unbound layers of each block of the pattern."""
    return [build_parts(*block) for block in lm.blocks]


def apply_group(lm: Backbone, stack: Stack, params: Params, carry: tuple, ctx: Context) -> tuple:
    """Returns the carry after one group of a stack; `params` are that group's, of a model that is not scanned."""
    return Group(*lm.group_fields(stack)).apply({"params": params}, carry, ctx, None)[0]
