"""Protocol of a training objective: what training, evaluation, planning and the row ask of it.

They know no token and no pixel. An objective is a frozen dataclass registered as ("objective", name).
"""

import math
import typing
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from efficientllm import sharding
from efficientllm.errors import FieldError
from efficientllm.metrics.reading import Part, Reading, finite_or_missing
from efficientllm.typing import Batch, Mesh, Params, PyTree

Model = typing.Any  # a `model.Backbone` with the ends that the objective fits
Metrics = dict[str, typing.Any]


class Losses(dict[str, float]):
    """Held-out losses by name, of which `eval_loss` is one.

    parts: of those that are means, `[(sum, weight)]` of each batch.
    """

    def __init__(
        self, losses: Mapping[str, float] | None = None, parts: Mapping[str, Sequence[Part]] | None = None
    ) -> None:
        super().__init__(losses or {})
        self.parts: Mapping[str, Sequence[Part]] = parts or {}


class Objective:
    """Base class of objectives; the class attributes have defaults."""

    # The `modality` of the data sources that it reads, and of the `embed` of its models: "text", "images".
    reads: typing.ClassVar[str] = "text"
    # What solvers integrate: "ddpm" or "flow"; empty for an objective that no solver samples from.
    process: typing.ClassVar[str] = ""
    # What a run counts: throughput per parameter (Eq. 4) is of tokens in text and, as in the study, of images.
    counted: typing.ClassVar[str] = "tokens"
    # Names of `Losses` and their units.
    units: typing.ClassVar[dict[str, str]] = {"eval_loss": "1"}
    # Unit of the training loss.
    unit: typing.ClassVar[str] = "1"
    # What the readings of held-out losses were computed from.
    evaluated_on: typing.ClassVar[str] = "held-out data"
    # Which of `Losses` compressed weights are judged by, and the name of `likelihood` of it.
    judged_by: typing.ClassVar[str] = "eval_loss"
    likelihood_name: typing.ClassVar[str] = ""

    def check(self, model: Model) -> None:
        """Raises UserError for a model that cannot be trained by this objective."""
        if model.reads != self.reads:
            name = type(self).__name__
            raise FieldError(
                "objective",
                f"{name} learns from {self.reads}; config.model.embed reads {model.reads}: give an objective of "
                f"{model.reads}, or 'pretrained', a checkpoint's own",
            )

    def axes(self, model: Model) -> dict[str, tuple[str | None, ...]]:
        """Returns the arrays of a batch that the loss reads, `{name: logical axes after the rows}`."""
        raise NotImplementedError(f"{type(self).__name__} defines no axes(model)")

    def row_shapes(self, model: Model, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the arrays of a batch for one row of `length` tokens, without the axis of rows."""
        raise NotImplementedError(f"{type(self).__name__} defines no row_shapes(model, length)")

    def loss(
        self, model: Model, params: Params, batch: Batch, key: jax.Array, totals: PyTree
    ) -> tuple[jax.Array, Metrics]:
        """Computes `(loss, metrics)` of a micro-batch; the mean over a step's micro-batches is the step's loss.

        Args:
          key: of this micro-batch; noise is drawn from it.
          totals: the result of `totals`, by which the micro-batch is weighted.

        `metrics` has `loss` (the objective alone), `total_loss` (what is differentiated) and `aux`, the statistics of
        each block, stacked over groups.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no loss(model, params, batch, key, totals)")

    def totals(self, batch: Batch, accumulate: int) -> PyTree:
        """Computes what the loss of each of `accumulate` micro-batches of `batch` is divided by."""
        raise NotImplementedError(f"{type(self).__name__} defines no totals(batch, accumulate)")

    def counts(self, model: Model, batch: Batch) -> dict[str, jax.Array]:
        """Counts `{"tokens", "samples"}` of a batch, padding left out."""
        raise NotImplementedError(f"{type(self).__name__} defines no counts(model, batch)")

    def held_out_sums(self, model: Model, params: Params, batch: Batch, table: PyTree) -> tuple:
        """Computes sums over a held-out batch, which `held_out` combines; `table` is that of `held_out_table`."""
        raise NotImplementedError(f"{type(self).__name__} defines no held_out_sums(model, params, batch, table)")

    def held_out(self, sums: list[tuple]) -> Losses:
        """Combines the sums of all batches, on the host and in double precision. Raises UserError without any row."""
        raise NotImplementedError(f"{type(self).__name__} defines no held_out(sums)")

    def held_out_table(self, model: Model, data: typing.Any) -> typing.Any:
        """Returns an array that `held_out_sums` takes, made once from the `data` of the run."""
        return jnp.zeros((0,))

    def likelihood(self, loss: float) -> float:
        """Converts the loss `judged_by` to a quality of which more is better, 1 at most: a quality of Eq. 9 (MCR)."""
        raise NotImplementedError(f"{type(self).__name__} defines no likelihood(loss)")

    def readings(self, losses: Mapping[str, float]) -> dict[str, Reading]:
        """Converts losses to Readings; one that is not finite is null, with the reason."""
        parts = losses.parts if isinstance(losses, Losses) else {}
        return {
            key: finite_or_missing(value, self.units[key], self.evaluated_on, parts.get(key, ()))
            for key, value in losses.items()
        }

    def batch_shapes(self, model: Model, rows: int, length: int, mesh: Mesh | None = None) -> Batch:
        """Returns the abstract arrays of a batch of `rows` rows, sharded over `mesh` if there is one."""
        shardings = {} if mesh is None else self.batch_shardings(model, mesh)
        return {
            name: jax.ShapeDtypeStruct((rows, *row.shape), row.dtype, sharding=shardings.get(name))
            for name, row in self.row_shapes(model, length).items()
        }

    def batch_shardings(self, model: Model, mesh: Mesh) -> dict[str, NamedSharding]:
        """Returns the sharding of each array of a batch."""
        return {name: sharding.batch_sharding(mesh, axes) for name, axes in self.axes(model).items()}


def exact_sum(values: typing.Iterable[float]) -> float:
    """Computes the exact sum. Infinities and NaN are added as floats, because `fsum` raises for them."""
    values = list(values)
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


def with_router_losses(loss: jax.Array, aux: tuple) -> tuple[jax.Array, Metrics]:
    """Adds the losses of the blocks' routers to an objective's `loss`; returns `Objective.loss`'s result."""
    router = sum(jnp.mean(leaf) for block in aux for leaf in block.get("losses", {}).values())
    total = loss + router
    return total, {"loss": loss, "total_loss": total, "aux": aux}
