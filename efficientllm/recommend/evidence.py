"""Evidence: what reports say of techniques, as ratios to the baseline of the same sweep.

A ratio of quality is taken from the model nearest in size, with the distance said. Times and energy count only of the
device and the model that is asked for. Groups are joined where their baselines are one technique.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import typing
from collections.abc import Sequence

from efficientllm.errors import UserError
from efficientllm.recommend.request import Changes, Request, batch_changes, distance
from efficientllm.recommend.techniques import Identity, identity_of, preset_of
from efficientllm.report import columns
from efficientllm.report.read_boards import Board

SAME_SIZE = 1.01  # factor between numbers of parameters of what is called one model


@dataclasses.dataclass(frozen=True)
class Variant:
    """A variant of a report's group, with its technique's identity; `parameters` are the model's."""

    board: str
    group: dict[str, typing.Any] = dataclasses.field(repr=False)
    content: dict[str, typing.Any] = dataclasses.field(repr=False)
    identity: Identity
    parameters: float
    config: Changes = dataclasses.field(repr=False)

    @property
    def name(self) -> str:
        return self.content["variant"]

    @property
    def is_baseline(self) -> bool:
        return self.name == self.group.get("baseline")

    def cell(self, key: str) -> dict[str, typing.Any]:
        return self.content["cells"].get(key) or {}


@dataclasses.dataclass(frozen=True)
class Figure:
    """What evidence says of a metric: the ratio to the baseline's with its interval, and how many processes say so.

    mean:  the ratio times the baseline's value, in the metric's unit.
    apart: the factor between the sizes of the measured and the asked model.
    """

    key: str
    ratio: float
    low: float | None
    high: float | None
    n: int
    mean: float
    apart: float
    variant: Variant = dataclasses.field(repr=False)

    def says(self, condition: typing.Any) -> bool | None:
        """Whether a condition holds; None for an absolute one where another model was measured."""
        if condition.relative is not None:
            return condition.holds(self.ratio)
        return condition.holds(self.mean) if self.apart <= SAME_SIZE else None

    @property
    def text(self) -> str:
        """The ratio with its interval, `1.117x (1.108 to 1.125)`."""
        if self.variant.is_baseline:
            return "1x, the baseline"
        if self.low is None or self.high is None:
            return f"{self.ratio:.3f}x, no interval"
        interval = "exactly" if self.low == self.high else f"({self.low:.3f} to {self.high:.3f})"
        return f"{self.ratio:.3f}x{', ' if interval == 'exactly' else ' '}{interval}"

    @property
    def is_far(self) -> bool:
        """Whether another model was measured than the one that is asked for."""
        return self.apart > SAME_SIZE

    def is_sure(self, condition: typing.Any) -> bool:
        """Whether the whole interval is on one side of a relative limit."""
        if self.variant.is_baseline or condition.relative is None:
            return True
        return self.low is not None and condition.holds(self.low) == condition.holds(self.high)


class Evidence:
    """All variants of the task in some boards.

    unread: a line for each group that says nothing, with the reason.
    """

    def __init__(self, request: Request, boards: Sequence[Board]):
        self.request = request
        self.unread: list[str] = []
        self.variants: list[Variant] = []
        for board in boards:
            for group in board.content["groups"]:
                if group["task"] == request.task:
                    self.variants += self._variants(board, group)
        self.reference = self._reference()

    def _variants(self, board, group):
        listed = []
        for content in group["variants"]:
            config = content.get("config") or preset_of(self.request.task, content["techniques"], content["variant"])
            if config is None or content["techniques"].get("reads", "text") != "text":
                continue
            try:
                identity = identity_of(self.request.task, config)
            except UserError as error:
                self.unread.append(f"left out: {_shown(board.folder)}: {content['variant']}: {error}")
                continue
            parameters = (content["cells"].get("params_total") or {}).get("mean")
            if parameters:
                listed.append(Variant(_shown(board.folder), group, content, identity, parameters, config))
        counts = collections.Counter(variant.identity for variant in listed)
        alone = [variant for variant in listed if counts[variant.identity] == 1]
        if any(variant.is_baseline for variant in alone):
            return alone
        self.unread.append(
            f"left out: {_shown(board.folder)}: sweep {group['sweep']}: its baseline is no technique of its own"
        )
        return []

    def _reference(self):
        """The identity that most groups are compared with; None without evidence."""
        counts = collections.Counter(v.identity for v in self.variants if v.is_baseline)
        return counts.most_common(1)[0][0] if counts else None

    @property
    def configs(self) -> list[Changes]:
        """The configs that were tried against the reference."""
        return [variant.config for variant in self.variants if self.baseline(variant).identity == self.reference]

    def baseline(self, variant: Variant) -> Variant:
        return next(v for v in self.variants if v.group is variant.group and v.is_baseline)

    def figure(self, identity: Identity, key: str, parameters: float) -> Figure | None:
        """The nearest Figure of a technique, or None; `parameters` are those of the asked model."""
        figures = [
            figure
            for variant in self.variants
            if variant.identity == identity and (figure := self._figure(variant, key, parameters))
        ]
        return min(figures, key=lambda figure: (figure.apart, -figure.n), default=None)

    def _figure(self, variant, key, parameters):
        baseline, cell = self.baseline(variant), variant.cell(key)
        expected = baseline.cell(key).get("mean")
        if baseline.identity != self.reference or not expected or not self._counts(variant, key, parameters):
            return None
        ratio = 1.0 if variant.is_baseline else cell.get("ratio")
        if ratio is None:
            return None
        apart = distance(parameters, variant.parameters)
        ends = cell.get("low"), cell.get("high")
        return Figure(key, ratio, *ends, cell.get("n") or 1, ratio * expected, apart, variant)

    def _counts(self, variant, key, parameters):
        """Whether a variant's value of this metric says anything of what is asked."""
        if columns.is_quality(key):  # that of random weights means nothing
            return self.request.task == "pretrain" or bool(variant.content["techniques"].get("model"))
        precision = variant.config.get("model.precision", "float32") == self.request.preset_precision
        same_size = distance(parameters, variant.parameters) < SAME_SIZE
        return same_size and precision and variant.group["device"] == self.request.device

    def measured(self, key: str, identities: Sequence[Identity], parameters: float) -> dict[Identity, Figure]:
        """The Figures of a metric measured on the asked device and model, all of one batch; the batch of most."""
        figures = {identity: self.figure(identity, key, parameters) for identity in identities}
        by_batch: dict[str, dict[Identity, Figure]] = collections.defaultdict(dict)
        for identity, figure in figures.items():
            if figure:
                by_batch[figure.variant.group["batch"]][identity] = figure
        return max(by_batch.values(), key=len, default={})

    def batch_of(self, figure: Figure) -> Changes:
        """The keys that its runs set the batch by."""
        keys = ("train.batch_size", "train.length", "infer.batch_size", "infer.prompt_length", "infer.max_new_tokens")
        told = {key: figure.variant.config[key] for key in keys if key in figure.variant.config}
        return batch_changes(self.request.task, figure.variant.group["batch"]) | told


def share_of_wins(a: Figure, b: Figure) -> float | None:
    """The share of draws in which a beats b, of two variants of one group; None where they were never compared."""
    if a.variant.group is not b.variant.group:
        return None
    wins = (a.variant.group.get("wins") or {}).get(a.key) or {}
    return (wins.get(a.variant.name) or {}).get(b.variant.name)


def _shown(folder):
    """A folder as it is named from here."""
    try:
        return str(pathlib.Path(folder).resolve().relative_to(pathlib.Path.cwd()))
    except ValueError:
        return str(folder)
