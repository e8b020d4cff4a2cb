"""The protocol of a feed-forward network: what the model, the cost formulas and training ask of it, with defaults."""

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax

from efficientllm.ops.attention import Context
from efficientllm.registry import spec_parameters

State = Any  # a pytree of arrays whose first axis is the batch's rows


class ExpertTraffic(NamedTuple):
    """What experts send over a mesh, for each row of the batch.

    Args:
      rows: rows of all experts' inputs that a row of tokens becomes.
      assignments: of a token to experts.
      hidden: the width of an expert.
      rounds_kernels: whether kernels are gathered in the dtype of products; else in float32.
    """

    rows: int
    assignments: int
    hidden: int
    rounds_kernels: bool


class FFN(nn.Module):
    """The part of a block that acts on each token: a dense network, a mixture of experts.

    A subclass is a flax module registered as ("ffn", name). Its fields are what a spec may set; those that the model
    knows (`hidden`, `dim`, `precision`) are filled in by name. One that only needs `x_BTD` defines `__call__`; one that
    reads the context or keeps a state defines `in_block` too.
    """

    # {name of a leaf of the state: logical axes behind the rows}; a leaf that is not named is whole on each device.
    state_axes: ClassVar[dict[str, tuple[str | None, ...]]] = {}
    # Whether recomputing its elementwise work in the backward pass is faster on CPUs than to save the results.
    recompute_elementwise: ClassVar[bool] = False
    # The name of what it computes, where several classes compute the same; a subclass has its own name if it says none.
    family: ClassVar[str]
    # Whether the planner can count what it sends over a mesh: the collectives of its kernels, and `expert_traffic`.
    has_counted_traffic: ClassVar[bool] = False
    # The share of its parameters with the logical axis "expert" that a token meets.
    active_fraction: ClassVar[float] = 1.0
    # Whether a loss of its own is of the whole batch, so that accumulated micro-batches have another.
    has_batch_loss: ClassVar[bool] = False

    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, dict]:
        """Returns `(y_BTD, aux)`.

        `aux["losses"]`, scalars by name, are added to the loss; `aux["stats"]`, means over the tokens that are no
        padding, are charted and given to `after_step`. Either may be missing.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no __call__(x_BTD)")

    def in_block(self, x_BTD: jax.Array, ctx: Context, state: State | None) -> tuple[jax.Array, State | None, dict]:
        """The block's call: `(y_BTD, state, aux)`.

        One that counts tokens, or lets them compete, reads `ctx.real_BT`, which is False for padding. The state is None
        in training, and comes from `init_state` in decoding.
        """
        y_BTD, aux = self(x_BTD)
        return y_BTD, state, aux

    def init_state(self, batch: int, length: int) -> State:
        """The state before the first token, of `batch` rows that will hold `length` tokens."""
        return {}

    def state_bytes(self, length: int) -> int:
        """Bytes of `init_state(1, length)`, as a formula."""
        return 0

    def kernel_rows(self, path: str, length: int) -> int:
        """How many rows the kernel at the parameter `path` multiplies for a row of `length` tokens: one a token."""
        return length

    def expert_traffic(self, length: int) -> ExpertTraffic | None:
        """What its experts send for a row of `length` tokens; None without experts."""
        return None

    def hyperparameters(self) -> dict[str, Any]:
        """What its outputs depend on beside its parameters; see `Mixer.hyperparameters`."""
        return {name: getattr(self, name) for name in spec_parameters(type(self))}

    def after_step(self, params: dict, stats: dict) -> dict:
        """Its parameters after a step's update that no gradient makes, given `aux["stats"]` of the step.

        Both are of one layer, or of layers stacked on a leading axis. Asked only where there are statistics.
        """
        return params
