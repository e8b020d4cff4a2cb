"""Protocol of a feed-forward network: the methods that the model, the cost model and training call, with defaults."""

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax

from efficientllm.ops.attention import Context
from efficientllm.registry import spec_parameters

State = Any  # a pytree of arrays whose first axis is the batch's rows


class ExpertTraffic(NamedTuple):
    """Traffic of experts over a mesh, for each row of the batch.

    Args:
      rows: rows of the inputs of all experts for a row of tokens.
      assignments: experts of a token.
      hidden: the width of an expert.
      rounds_kernels: whether kernels are all-gathered in the dtype of products; else in float32.
    """

    rows: int
    assignments: int
    hidden: int
    rounds_kernels: bool


class FFN(nn.Module):
    """Base class of feed-forward networks: dense networks, mixtures of experts.

    A subclass is a flax module registered as ("ffn", name). A spec sets its fields. The model fills in by name the
    fields that it knows (`hidden`, `dim`, `precision`). A subclass that only needs `x_BTD` defines `__call__`. One
    that reads the context or has a state defines `in_block` too.
    """

    # {name of a leaf of the state: logical axes after the batch axis}; other leaves are replicated but for their rows.
    state_axes: ClassVar[dict[str, tuple[str | None, ...]]] = {}
    # Orders of tokens that it honours (`ops.attention_mask.Mask.order`).
    orders: ClassVar[tuple[str, ...]] = ("causal", "bidirectional", "prefix")
    # Whether rematerializing its elementwise operations is faster on CPUs than saving their results.
    recompute_elementwise: ClassVar[bool] = False
    # Whether training on one GPU saves only its products with kernels and a recurrence's states and outputs.
    saves_products: ClassVar[bool] = False
    # The name that classes share which compute the same function. A subclass without it has the name of its class.
    family: ClassVar[str]
    # Whether the planner can count its traffic: it has no collectives but those of its kernels and `expert_traffic`.
    has_counted_traffic: ClassVar[bool] = False
    # The share of its parameters with the logical axis "expert" that are active for a token.
    active_fraction: ClassVar[float] = 1.0
    # Whether an auxiliary loss depends on the whole batch, so that gradient accumulation changes its value.
    has_batch_loss: ClassVar[bool] = False

    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, dict]:
        """Applies the network to each token; returns `(y_BTD, aux)`.

        `aux["losses"]`, scalars by name, are added to the loss. `aux["stats"]`, means over the tokens without padding,
        are logged and passed to `after_step`. Either may be missing.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no __call__(x_BTD)")

    def in_block(self, x_BTD: jax.Array, ctx: Context, state: State | None) -> tuple[jax.Array, State | None, dict]:
        """Applies the network as a block calls it; returns `(y_BTD, state, aux)`.

        A network whose tokens compete, or that counts them, reads `ctx.real_BT`, which is False for padding. The state
        is None in training, and comes from `init_state` in decoding.
        """
        y_BTD, aux = self(x_BTD)
        return y_BTD, state, aux

    def init_state(self, batch: int, length: int) -> State:
        """Returns the state before the first token, for `batch` rows of up to `length` tokens."""
        return {}

    def state_bytes(self, length: int) -> int:
        """Computes the bytes of `init_state(1, length)` by a formula."""
        return 0

    def kernel_rows(self, path: str, length: int) -> int:
        """Counts the rows that the kernel at the parameter `path` multiplies for a row of `length` tokens."""
        return length

    def expert_traffic(self, length: int) -> ExpertTraffic | None:
        """Counts the traffic of experts for a row of `length` tokens; None without experts."""
        return None

    def hyperparameters(self) -> dict[str, Any]:
        """Returns the fields that the outputs depend on beside the parameters; see `Mixer.hyperparameters`."""
        return {name: getattr(self, name) for name in spec_parameters(type(self))}

    def after_step(self, params: dict, stats: dict) -> dict:
        """Applies the updates that no gradient makes, from `aux["stats"]` of a step; returns the parameters.

        `params` and `stats` are of one layer, or of layers stacked on a leading axis. It is called only where `aux` has
        statistics.
        """
        return params
