"""Protocol of a sequence mixer: the methods that the model, the cost model and decoding call, with defaults."""

from typing import Any, ClassVar

import flax.linen as nn
import jax

from efficientllm.ops.attention import Context
from efficientllm.registry import spec_parameters

State = Any  # a pytree of arrays whose first axis is the batch's rows


class Mixer(nn.Module):
    """Base class of sequence mixers: attention, state-space models, linear recurrences.

    A subclass is a flax module registered as ("mixer", name). A spec sets its fields. The model fills in by name the
    fields that it knows (`num_heads`, `dim`, `precision`, `position`...). A subclass defines `__call__`, `init_state`,
    `state_bytes` and `mix_flops`; the other methods have defaults.
    """

    # Where a position encoding may act: "heads" (queries and keys), "scores", "embedding". The model reads it where the
    # mixer has a field `position`.
    admits: ClassVar[tuple[str, ...]] = ()
    # {name of a leaf of the state: logical axes after the batch axis}; other leaves are replicated but for their rows.
    state_axes: ClassVar[dict[str, tuple[str | None, ...]]] = {}
    # Whether rematerializing its elementwise operations is faster on CPUs than saving their results.
    recompute_elementwise: ClassVar[bool] = False
    # Whether training on one GPU saves only its products with kernels and a recurrence's states and outputs.
    saves_products: ClassVar[bool] = False
    # Whether training recomputes what is around its recurrence (`ops.rematerialization.call_recurrent`).
    is_recurrent: ClassVar[bool] = False
    # Orders of tokens that it honours (`ops.attention_mask.Mask.order`).
    orders: ClassVar[tuple[str, ...]] = ("causal",)
    # Whether a conditioning vector shifts, scales and gates its branch of a block.
    conditioned: ClassVar[bool] = True
    # Slots of a bin of whole windows, of a mixer that attends within windows of an image; 0 for others.
    bin = 0
    # Names of kernels that multiply the condition of a request alone (`request_state`).
    request_kernels: ClassVar[tuple[str, ...]] = ()
    # The name that classes share which compute the same function. A subclass without it has the name of its class.
    family: ClassVar[str]

    def __call__(self, x_BTD: jax.Array, ctx: Context, state: State | None = None) -> tuple:
        """Mixes tokens; returns `(y_BTD, state)` or `(y_BTD, state, memo)`.

        Args:
          x_BTD: the normalized activations of a block.
          ctx: `ctx.positions_BT` restart at 0 with each packed document; `ctx.mask` says which token may read which.
          state: None in training; the returned state is then None too. In decoding the state holds the tokens before
            those at `ctx.positions_BT`.

        `memo` is a dict that later layers read as `ctx.memo`.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no __call__(x_BTD, ctx, state)")

    def init_state(self, batch: int, length: int) -> State:
        """Returns the state before the first token, for `batch` rows of up to `length` tokens."""
        raise NotImplementedError(f"{type(self).__name__} defines no init_state(batch, length)")

    @property
    def block_norm(self) -> str:
        """The norm before it in a block where that is another than the model's; of parallel mixers, the first's."""
        return ""

    def request_state(self, ctx: Context) -> State | None:
        """Computes from its parameters what depends on the condition of a request alone; None is nothing.

        A sampler calls it once a request, not in each step, and hands the result to `__call__` as the state.
        """
        return None

    def state_bytes(self, length: int) -> int:
        """Computes the bytes of `init_state(1, length)` by a formula."""
        raise NotImplementedError(f"{type(self).__name__} defines no state_bytes(length)")

    def mix_flops(self, length: int, executed: bool = False, order: str = "causal") -> float:
        """Counts the forward FLOPs of a row of `length` tokens outside the products with kernels; a multiply-add is 2.

        Masked query-key pairs do not count, except with `executed`, which counts what the kernel in use computes. A
        mixer whose `orders` are causal alone needs no parameter `order`.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no mix_flops(length, executed)")

    def kernel_rows(self, path: str, length: int, order: str = "causal") -> int:
        """Counts the rows that the kernel at the parameter `path` multiplies for a row of `length` tokens."""
        return length

    def init_memo(self, batch: int, length: int, dim: int) -> dict[str, jax.Array]:
        """Returns the `ctx.memo` of the first layer, for rows of `length` tokens and a model of width `dim`."""
        return {}

    def gathered_heads(self) -> tuple[int, int] | None:
        """Returns the KV heads and head size of the keys and values that the mesh axis `sequence` all-gathers.

        None where the planner cannot count the traffic: the mixer has other collectives than these and its kernels'.
        """
        return None

    def hyperparameters(self) -> dict[str, Any]:
        """Returns the fields that the outputs depend on beside the parameters.

        An exported model is compared with its source by them: two mixers of one `family` with equal hyperparameters
        compute the same function. The default is all fields. A mixer overrides it where a field changes no output, or
        where a default stands for another value.
        """
        return {name: getattr(self, name) for name in spec_parameters(type(self))}

    def head_counts(self) -> tuple[int, int]:
        """Returns the query heads and KV heads by which other programs order kernel rows; zeros without heads."""
        return 0, 0
