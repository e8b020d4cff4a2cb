"""The protocol of a sequence mixer: what the model, the cost formulas and decoding ask of it, with defaults."""

from typing import Any, ClassVar

import flax.linen as nn
import jax

from efficientllm.ops.attention import Context
from efficientllm.registry import spec_parameters

State = Any  # a pytree of arrays whose first axis is the batch's rows


class Mixer(nn.Module):
    """The part of a block in which tokens read one another: attention, a state-space model, a recurrence.

    A subclass is a flax module registered as ("mixer", name). Its fields are what a spec may set; those that the model
    knows (`num_heads`, `dim`, `precision`, `position`...) are filled in by name. It defines `__call__`, `init_state`,
    `state_bytes` and `mix_flops`; the rest has defaults.
    """

    # Where a position encoding may act on it: "heads" (queries and keys), "scores", "embedding". Asked where the mixer
    # has a field `position`.
    admits: ClassVar[tuple[str, ...]] = ()
    # {name of a leaf of the state: logical axes behind the rows}; a leaf that is not named is whole on each device.
    state_axes: ClassVar[dict[str, tuple[str | None, ...]]] = {}
    # Whether recomputing its elementwise work in the backward pass is faster on CPUs than to save the results.
    recompute_elementwise: ClassVar[bool] = False
    # The name of what it computes, where several classes compute the same; a subclass has its own name if it says none.
    family: ClassVar[str]

    def __call__(self, x_BTD: jax.Array, ctx: Context, state: State | None = None) -> tuple:
        """Returns `(y_BTD, state)`, or `(y_BTD, state, memo)`.

        `x_BTD` are the normed activations of a block. `ctx.positions_BT` start again at 0 with each packed document;
        `ctx.mask` says which token may read which. Without a state the row is all there is, and the state returned is
        None. With one, the tokens are those at `ctx.positions_BT`, and what came before them is in the state.
        `memo` is a dict for later layers, which find it in `ctx.memo`.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no __call__(x_BTD, ctx, state)")

    def init_state(self, batch: int, length: int) -> State:
        """The state before the first token, of `batch` rows that will hold `length` tokens."""
        raise NotImplementedError(f"{type(self).__name__} defines no init_state(batch, length)")

    def state_bytes(self, length: int) -> int:
        """Bytes of `init_state(1, length)`, as a formula."""
        raise NotImplementedError(f"{type(self).__name__} defines no state_bytes(length)")

    def mix_flops(self, length: int, executed: bool = False) -> float:
        """Forward FLOPs of a row of `length` tokens in products that read no `kernel`, a multiply-add being 2.

        What the model needs (a causal pair of query and key counts, a masked one does not), or with `executed` what the
        kernel in use computes.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no mix_flops(length, executed)")

    def kernel_rows(self, path: str, length: int) -> int:
        """How many rows the kernel at the parameter `path` multiplies for a row of `length` tokens: one a token."""
        return length

    def init_memo(self, batch: int, length: int, dim: int) -> dict[str, jax.Array]:
        """What the first layer finds in `ctx.memo`, for rows of `length` tokens and a model of width `dim`."""
        return {}

    def gathered_heads(self) -> tuple[int, int] | None:
        """The KV heads, and their width, of the keys and values that the mesh axis `sequence` all-gathers.

        None where the planner is not to count what it sends: other collectives than these and those of its kernels.
        """
        return None

    def hyperparameters(self) -> dict[str, Any]:
        """What its outputs depend on beside its parameters, by which an exported model is compared with this one.

        All fields, unless it is overridden: by a mixer with fields that change no output, or that stand for another
        value. Two mixers of one `family` with equal hyperparameters compute the same.
        """
        return {name: getattr(self, name) for name in spec_parameters(type(self))}

    def head_counts(self) -> tuple[int, int]:
        """Query heads and KV heads, by which other programs order the rows of its kernels; zeros without heads."""
        return 0, 0
