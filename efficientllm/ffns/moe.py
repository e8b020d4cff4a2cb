"""Sparse mixture of experts (MoE) with top-k routing (Shazeer et al. 2017, arXiv:1701.06538)."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.errors import UserError, did_you_mean
from efficientllm.ffns import dispatch, routing
from efficientllm.ffns.base import FFN, Context, ExpertTraffic, State
from efficientllm.ffns.dense import ACTIVATIONS, Network
from efficientllm.ffns.experts import Experts
from efficientllm.layers import Linear
from efficientllm.registry import names, register
from efficientllm.typing import Params
from efficientllm.weights import FLOAT32, Precision, activation_dtype, matmul

DISPATCH = ("dropless", "capacity")


@register(
    "ffn",
    "moe",
    example="moe(num_experts=8, top_k=2, hidden=32, shared_hidden=16, groups=4, top_groups=2)",
    choices={"scores": tuple(routing.SCORES), "dispatch": DISPATCH, "activation": tuple(ACTIVATIONS)},
)
class MoE(FFN, kw_only=True):
    """Mixture of experts: `sum over the top_k experts e of weight_e * network_e(x)`, plus an optional shared expert.

    Args:
      num_experts, top_k: the number of experts, and of experts that a token is routed to.
      hidden: width of one expert.
      scores: `softmax` or `sigmoid` of the router's logits.
      normalise: whether a token's weights are divided by their sum.
      scale: factor of the weights (DeepSeek's routed_scaling_factor).
      groups, top_groups: the number of equal groups of experts, and of groups that a token is routed to (DeepSeek-V2).
      shared_hidden: width of the shared expert, which every token passes; 0 is no shared expert.
      shared_gate: whether a learned sigmoid multiplies the shared expert's output (Qwen2-MoE).
      load_balance, z_loss: coefficients of the router's two losses (`routing.load_balance_loss`, `routing.z_loss`).
        With `config.train.accumulate` the first is the mean over micro-batches, which differs from the whole batch's.
      bias_rate: step of the loss-free balancing bias (`after_step`); 0 is no bias.
      dispatch: `dropless` computes every assignment; over the mesh axis `expert` tokens travel in as many rounds of
        `capacity_factor` times a device's fair share as it takes. `capacity` gives each expert `capacity_factor` times
        its fair share of each row of the batch and drops the rest (`dispatch.capacity` says in which order, and why
        that is not causal).
      kernel: `auto` or a registered `grouped_kernel`, for dropless dispatch.
      activation: of every expert, the shared one too: `swiglu`, or another of `dense.ACTIVATIONS`.
      use_bias: whether the linear maps of every expert have biases.

    The router is float32 under every precision policy. Raises UserError for inconsistent values.
    """

    num_experts: int
    top_k: int
    hidden: int
    precision: str
    scores: str = "softmax"
    normalise: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    shared_hidden: int = 0
    shared_gate: bool = False
    load_balance: float = 0.01
    z_loss: float = 0.001
    bias_rate: float = 0.0
    dispatch: str = "dropless"
    capacity_factor: float = 1.25
    kernel: str = "auto"
    activation: str = "swiglu"
    use_bias: bool = False

    family = "moe"
    has_counted_traffic = True

    def __post_init__(self):
        self._check()
        super().__post_init__()

    @nn.compact
    def __call__(self, x_BTD: jax.Array, ctx: Context | None = None) -> tuple[jax.Array, dict]:
        """Routes tokens to experts; returns `(y_BTD, aux)`, with `aux` over the tokens without padding.

        `aux["losses"]`: `load_balance` and `z_loss`, times their coefficients. `aux["stats"]`: `load` `[E]`, each
        expert's share of the assignments (sums to one, 1/E where balanced); `entropy` of the router in nats;
        `drop_rate`, the share of dropped assignments; `rounds` in which tokens travelled, where they did without a
        capacity (`ffns.expert_all_to_all`).
        """
        real_BT = None if ctx is None else ctx.real_BT
        logits_BTE, bias_E = Router(self.num_experts, self.bias_rate > 0, name="router")(x_BTD)
        routed = routing.route(
            logits_BTE, self.top_k, self.scores, self.normalise, self.scale, bias_E, self.groups, self.top_groups
        )
        load_E = routing.load(routed.experts_BTk, self.num_experts, real_BT)
        precision = Precision.of(self.precision)
        network: dict[str, Any] = {"activation": self.activation, "use_bias": self.use_bias}
        experts = Experts(
            self.num_experts,
            self.hidden,
            precision,
            self._plan(),
            self.kernel,
            round_factor=self.capacity_factor,
            **network,
            name="experts",
        )
        y_BTD, kept_BTk, rounds = experts(x_BTD, routed.experts_BTk, routed.weights_BTk, real_BT)
        if self.shared_hidden:
            y_BTD = y_BTD + self._shared(x_BTD)
        losses = {
            "load_balance": self.load_balance * routing.load_balance_loss(routed, load_E, real_BT),
            "z_loss": self.z_loss * routing.z_loss(logits_BTE, real_BT),
        }
        dropped = jnp.zeros(())
        if kept_BTk is not None:
            dropped = routing.mean(1.0 - jnp.mean(kept_BTk.astype(jnp.float32), -1), real_BT)
        entropy = routing.entropy(routed.probabilities_BTE, real_BT)
        stats = {"load": load_E, "entropy": entropy, "drop_rate": dropped}
        if rounds is not None:
            stats["rounds"] = rounds.astype(jnp.float32)
        return y_BTD, {"losses": losses, "stats": jax.lax.stop_gradient(stats)}

    def in_block(self, x_BTD: jax.Array, ctx: Context, state: State | None) -> tuple[jax.Array, State | None, dict]:
        y_BTD, aux = self(x_BTD, ctx)
        return y_BTD, state, aux

    def _plan(self):
        if self.dispatch == "dropless":
            return dispatch.dropless
        return functools.partial(dispatch.capacity, factor=self.capacity_factor)

    def _shared(self, x_BTD):
        y_BTD, _ = Network(self.shared_hidden, self.precision, self.use_bias, self.activation, name="shared")(x_BTD)
        if self.shared_gate:
            y_BTD = y_BTD * jax.nn.sigmoid(Linear(1, ("embed", None), self.precision, name="shared_gate")(x_BTD))
        return y_BTD

    def after_step(self, params: Params, stats: dict[str, jax.Array]) -> Params:
        """Updates the balancing bias: b_e += rate * sign(mean load - load_e) (arXiv:2412.19437, Section 2.1.2).

        `params` and `stats` are of this layer, or of layers stacked on a leading axis.
        """
        if not self.bias_rate:
            return params
        router, load_E = params["router"], stats["load"]
        error_E = jnp.mean(load_E, -1, keepdims=True) - load_E
        return params | {"router": router | {"bias": router["bias"] + self.bias_rate * jnp.sign(error_E)}}

    @property
    def has_batch_loss(self) -> bool:
        """Whether the load-balance loss, which is of the whole batch, is in use."""
        return self.load_balance > 0

    @property
    def active_fraction(self) -> float:
        """The share of the experts' parameters that are active for a token."""
        return self.top_k / self.num_experts

    def temporary_bytes(self, batch: int, length: int, dim: int) -> int:
        """Estimates the temporary bytes of a training step, beside parameters, gradients, input and output.

        At most six arrays of the experts' width (gate, up, the input of the last product, and their gradients; four
        without a gate) and four of the model's width (the experts' inputs, both terms of their gradient, the output's
        gradient), with a row for each assignment; and one kernel of an expert with its gradient. The shared expert is
        not counted.
        """
        assignments = batch * length * self.top_k
        if self.dispatch == "capacity":
            places = dispatch.rows_per_expert(length, self.num_experts, self.top_k, self.capacity_factor)
            assignments = batch * self.num_experts * places
        arrays = 6 if ACTIVATIONS[self.activation].is_gated else 4
        rows = assignments * (arrays * self.hidden + 4 * dim) * activation_dtype(self.precision).itemsize
        return rows + 2 * 4 * dim * self.hidden

    def expert_traffic(self, length: int) -> ExpertTraffic:
        places = dispatch.rows_per_expert(length, self.num_experts, self.top_k, self.capacity_factor)
        return ExpertTraffic(self.num_experts * places, self.top_k, self.hidden, self.dispatch == "capacity")

    def hyperparameters(self) -> dict[str, Any]:
        names = ("num_experts", "top_k", "hidden", "scores", "normalise", "scale", "groups", "shared_hidden")
        others = ("shared_gate", "dispatch", "activation", "use_bias")
        fields = {name: getattr(self, name) for name in (*names, *others)}
        return fields | {"router_bias": self.bias_rate > 0, "top_groups": self.top_groups if self.groups > 1 else 1}

    def _check(self):
        choices = {
            "scores": list(routing.SCORES),
            "dispatch": list(DISPATCH),
            "activation": list(ACTIVATIONS),
            "kernel": ["auto", *names("grouped_kernel")],
        }
        for field, values in choices.items():
            value = getattr(self, field)
            if value not in values:
                hint = did_you_mean(str(value), values)
                raise UserError(f"moe: {field} = {value!r} is none of {', '.join(values)}{hint}")
        if not 1 <= self.top_k <= self.num_experts:
            raise UserError(f"moe: top_k = {self.top_k} must lie between 1 and num_experts = {self.num_experts}")
        if self.groups < 1 or self.num_experts % self.groups:
            raise UserError(f"moe: groups = {self.groups} must divide num_experts = {self.num_experts}")
        if not 1 <= self.top_groups <= self.groups or self.top_k > self.num_experts // self.groups * self.top_groups:
            raise UserError(
                f"moe: top_groups = {self.top_groups} must lie between 1 and groups = {self.groups}, "
                f"and hold top_k = {self.top_k} experts"
            )
        if self.groups > 1 and self.scores == "sigmoid" and self.num_experts < 2 * self.groups:
            raise UserError(f"moe: groups = {self.groups} are compared by their two best experts; they hold one")
        if self.shared_gate and not self.shared_hidden:
            raise UserError("moe: shared_gate = True needs a shared expert; set shared_hidden, its width")


class Router(nn.Module):
    """Router: logits `[B, T, E]` in float32, and the balancing bias `[E]` or None."""

    num_experts: int
    use_bias: bool

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("embed", None))
        kernel_DE = self.param("kernel", init, (x_BTD.shape[-1], self.num_experts))
        logits_BTE = matmul(x_BTD.astype(jnp.float32), kernel_DE, FLOAT32)
        if not self.use_bias:
            return logits_BTE, None
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, (None,))
        return logits_BTE, self.param("bias", zeros, (self.num_experts,))
