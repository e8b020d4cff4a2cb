"""Groups of rows that are ranked together: ratios to the baseline, ranks, and the noise floor.

Rows of one sweep, task, device and effective batch form a Group. A quality sweep and a cost sweep of the same variants
form one together (see `joined_sweeps`). A measured metric needs more (see `comparability`):
equal training; for energy the same scope; for memory the same allocator; for times an otherwise idle machine, or the
same randomised block. A variant that lacks this is shown with the reason, without ratio or rank. A verdict within the
noise floor, which is what the baseline shows against itself, is withheld.
"""

import collections
import math
from collections.abc import Sequence

import numpy as np

from efficientllm.report import (
    columns,
    comparability,
    compression_rates,
    held_out_parts,
    joined_sweeps,
    ranking,
    statistics,
)
from efficientllm.report.comparability import batch, device
from efficientllm.report.rows import Row

__all__ = ["Group", "batch", "device", "group_rows"]


_DRAWS_OF_MANY = 2000


class Group:
    """Rows that share a ranking. `baseline` is a variant's name, or None if it has no row here."""

    def __init__(self, key: tuple[str, str, str, str], rows: Sequence[Row], baseline: str | None = None):
        self.sweep, self.task, self.device, self.batch = key
        self.rows = sorted(rows, key=lambda row: (row.block, row.order, row.started, str(row.path)))
        self.variants = list(dict.fromkeys(row.variant for row in sorted(rows, key=lambda row: row.started)))
        named = baseline or next((row.baseline for row in self.rows if row.baseline), None)
        ended_well = [v for v in self.variants if any(row.ok for row in rows if row.variant == v)]
        self.baseline = named if named in self.variants else (None if named else (ended_well or self.variants)[0])
        self.variants.sort(key=lambda variant: variant != self.baseline)
        self.rows = compression_rates.add_rates(
            self.rows, [row for row in self.rows if row.variant == self.baseline and not row.predicted]
        )
        self.blocks = list(dict.fromkeys(row.block for row in self.rows if row.ok))
        self.measured = [row for row in self.rows if row.ok and not row.predicted]
        self.sweep_parts = joined_sweeps.measured_parts(self.rows)
        self._of = collections.defaultdict(list)
        for row in self.rows:
            self._of[row.variant].append(row)
        self._noise: dict[str, statistics.Noise | None] = {}

    @property
    def name(self) -> str:
        labels = (self.sweep, self.task, self.device, self.batch)
        return " · ".join(label for label in labels if label)

    def of(self, variant: str) -> list[Row]:
        return self._of.get(variant, [])

    def supplying(self, variant: str, key: str) -> list[Row]:
        """The measured rows of a variant that supply a metric."""
        return [row for row in self.of(variant) if row.ok and not row.predicted and self._supplies(row, key)]

    def _supplies(self, row, key):
        return joined_sweeps.supplies(row, key, self.sweep_parts)

    def blocks_of(self, key: str) -> list[str]:
        """The blocks of the rows that supply a metric, in order."""
        return list(dict.fromkeys(row.block for row in self.rows if row.ok and self._supplies(row, key)))

    def refusal(self, variant: str, key: str) -> str | None:
        """Why this variant's metric is not compared or ranked, or None."""
        rows = self.supplying(variant, key)
        if any(row.predicted for row in self.of(variant)):
            return "predicted, not measured"
        if not rows and any(row.ok for row in self.of(variant)):
            return joined_sweeps.why_not(self.of(variant), key)
        if not rows:
            return f"no run ended well ({', '.join(sorted({row.outcome for row in self.of(variant)}))})"
        recorded = [row for row in rows if row.values.get(key) is not None]
        if not recorded:
            return rows[0].reasons.get(key, "not recorded")
        if self.baseline is None:
            return "the baseline has no row here"
        reference = [row for row in self.supplying(self.baseline, key) if row.values.get(key) is not None]
        if not reference:
            return f"the baseline's is null: {self._why_null(key)}"
        if any(row.values[key] <= 0 for row in recorded + reference):
            return "not positive in every row: no ratio"
        if among := comparability.find_difference(reference, reference[0], key, "another row's of it"):
            return f"the baseline's rows are not alike: {among}"
        return comparability.find_difference(recorded, reference[0], key) or self._disturbance(
            recorded + reference, key
        )

    def _disturbance(self, rows, key):
        """Why times of starved rows are not compared, or None. In a sweep's blocks a disturbance meets all variants."""
        measured = [row for row in self.measured if self._supplies(row, key)]
        if not columns.is_timed(key) or comparability.in_blocks(measured):
            return None
        return comparability.starved(rows)

    def _why_null(self, key):
        rows = [row for row in self.of(self.baseline) if self._supplies(row, key)]
        return next((row.reasons[key] for row in rows if key in row.reasons), "no run of it ended well")

    def logs(self, key: str, variants: Sequence[str]) -> np.ndarray:
        """`logs_VB`: log-ratios to the mean of the block's baselines; NaN where a block lacks one or the other."""
        blocks = self.blocks_of(key)
        logs_VB = np.full((len(variants), len(blocks)), np.nan)
        reference = self._means(self.baseline, key)
        for v, variant in enumerate(variants):
            for block, mean in self._means(variant, key).items():
                if block in reference:
                    logs_VB[v, blocks.index(block)] = mean - reference[block]
        return logs_VB

    def _means(self, variant, key):
        logs_by_block = collections.defaultdict(list)
        for row in self.supplying(variant, key):
            if (row.values.get(key) or 0) > 0:
                logs_by_block[row.block].append(math.log(row.values[key]))
        return {block: sum(logs) / len(logs) for block, logs in logs_by_block.items()}

    def between(self, key: str, variant: str, other: str) -> tuple[statistics.Interval | None, str | None]:
        """`(Interval of variant over other or None, reason or None)`, paired in every block that has both."""
        reason = self.refusal(variant, key) or self.refusal(other, key)
        if reason:
            return None, reason
        a, b = self._means(variant, key), self._means(other, key)
        shared = [block for block in self.blocks_of(key) if block in a and block in b]
        if not shared:
            return None, "no block holds both"
        logs_B = [a[block] - b[block] for block in shared]
        return self._interval(key, variant, other, logs_B), None

    def _interval(self, key, variant, other, logs_B):
        """The Interval over blocks; of one block of inference, over the parts of the held-out text."""
        sides = [self.supplying(side, key) for side in (variant, other)]
        by_text = None
        if len(logs_B) == 1 == len(sides[0]) == len(sides[1]):
            of_key = compression_rates if key == compression_rates.KEY else held_out_parts
            by_text = of_key.text_interval(key, sides[0][0], sides[1][0])
        return by_text or statistics.ratio_interval(logs_B, columns.is_exact(key))

    def compare(self, key: str, better: str | None) -> tuple[dict[str, dict], dict[str, dict[str, float]]]:
        """`{variant: cell}` and win shares (`{variant: {variant: share}}`) of a metric, in plain Python numbers.

        Conditions of the measurement are shown, not compared.
        """
        if columns.is_condition(key):
            return {variant: self._shown(variant, key) for variant in self.variants}, {}
        reasons = {variant: self.refusal(variant, key) for variant in self.variants}
        cells = {variant: self._cell(variant, key, reasons[variant], better) for variant in self.variants}
        ranked = self.ranked(key)
        if better is None or len(ranked) < 2:
            return cells, {}
        logs_VB, floor = self.logs(key, ranked), self._floor(key, cells)
        sure, many = self.is_sure(key, ranked), len(ranked) > ranking.MANY
        draws_RV = statistics.draws(logs_VB, 1 if not sure else _DRAWS_OF_MANY if many else statistics.DRAWS)
        for variant, (rank, low, high) in zip(
            ranked, ranking.rank_ranges(np.nanmean(logs_VB, 1), draws_RV, better, floor), strict=True
        ):
            cells[variant] |= {"rank": rank, "rank_low": low if sure else None, "rank_high": high if sure else None}
        if not sure or many:
            return cells, {}
        wins_VV = ranking.win_shares(draws_RV, better, floor)
        return cells, {a: dict(zip(ranked, row, strict=True)) for a, row in zip(ranked, wins_VV.tolist(), strict=True)}

    def _floor(self, key, cells):
        """The log difference that ranks treat as a tie: the noise if it has withheld a verdict, else 0."""
        noisy = any(cell.get("verdict", "").startswith("withheld") for cell in cells.values())
        return statistics.noise_reach(self.noise(key)) if noisy else 0.0

    def ranked(self, key: str) -> list[str]:
        """The variants that this metric ranks: those compared with the baseline in at least one block."""
        comparable = [variant for variant in self.variants if self.refusal(variant, key) is None]
        if not comparable:
            return []
        return [v for v, row in zip(comparable, np.isfinite(self.logs(key, comparable)).any(1), strict=True) if row]

    def is_sure(self, key: str, variants: Sequence[str]) -> bool:
        """True if draws of these variants are meaningful: two blocks each, or exact values."""
        return columns.is_exact(key) or bool((np.isfinite(self.logs(key, variants)).sum(1) > 1).all())

    def _shown(self, variant, key, reason=None):
        rows = [row for row in self.of(variant) if self._supplies(row, key)]
        values = [row.values[key] for row in rows if row.ok and row.values.get(key) is not None]
        if not rows:
            reason = joined_sweeps.why_not(self.of(variant), key)
        elif not values and reason is None:
            reason = next((row.reasons[key] for row in rows if key in row.reasons), "not recorded")
        return {"mean": statistics.geometric_mean(values), "n": len(values), "reason": reason}

    def _cell(self, variant, key, reason, better):
        cell = self._shown(variant, key, reason)
        if (
            cell["n"]
            and columns.is_timed(key)
            and (count := sum(bool(row.starved) for row in self.supplying(variant, key)))
        ):
            cell["starved"] = count
        if reason or variant == self.baseline:
            return cell
        logs_B = self.logs(key, [variant])[0]
        interval = self._interval(key, variant, self.baseline, logs_B[np.isfinite(logs_B)])
        if interval is None:
            return cell | {"reason": "no block holds it and the baseline"}
        return cell | {
            "ratio": interval.ratio,
            "low": interval.low,
            "high": interval.high,
            "blocks": interval.blocks,
            "method": interval.method,
            "verdict": self.withheld(key, interval) or statistics.verdict(interval, better),
        }

    def withheld(self, key: str, interval: statistics.Interval | None, limit: float = 1.0) -> str | None:
        """Why the verdict on an interval against `limit` is withheld, or None; see `statistics.within_noise`."""
        noise = None if columns.is_exact(key) or interval is None else self.noise(key)
        if noise is None or not statistics.within_noise(interval, noise, limit):
            return None
        low, high = noise.interval.low, noise.interval.high
        floor = statistics.WIDE if statistics.is_wide(low, high) else f"{low:.3f} to {high:.3f} of itself"
        return f"withheld: within the noise floor, which is the baseline at {floor}"

    def noise(self, key: str) -> statistics.Noise | None:
        """The statistics.Noise of the baseline against itself, or None if no block has it twice.

        Pairs are the first and last baseline run of a block, or the baseline and a variant of the same config.
        """
        if key not in self._noise:
            self._noise[key] = self._find_noise(key)
        return self._noise[key]

    def _find_noise(self, key):
        pairs, baselines = [], 1
        rows = [row for row in self.supplying(self.baseline, key) if (row.values.get(key) or 0) > 0]
        for block in self.blocks_of(key):
            values = [row.values[key] for row in rows if row.block == block]
            if len(values) > 1:
                pairs.append(math.log(values[-1] / values[0]))
                baselines = 2
        for variant in self.twins():
            if not pairs and self.refusal(variant, key) is None:
                logs_B = self.logs(key, [variant])[0]
                pairs = logs_B[np.isfinite(logs_B)].tolist()
        return statistics.estimate_noise(pairs, baselines, len(self.blocks_of(key)))

    def twins(self) -> list[str]:
        """Variants with the baseline's config: a difference between them is noise."""
        identities = {row.identity for row in self.rows if row.variant == self.baseline}
        return [v for v in self.variants if v != self.baseline and {row.identity for row in self.of(v)} == identities]


def group_rows(rows: Sequence[Row], baseline: str | None = None) -> list[Group]:
    """Groups these rows; groups of sweeps come first.

    `baseline` is a variant, or keys and values of its config (`model.mixer=gqa`). A run that failed before its device
    was recorded joins the groups of its sweep; without a sweep it is in no group.
    """
    rows_by_key = collections.defaultdict(list)
    for row in rows:
        if not _is_lost(row):
            rows_by_key[_key(row)].append(row)
    for row in filter(_is_lost, rows):
        for key in [key for key in rows_by_key if row.sweep and key[0] == row.sweep.get("name")]:
            rows_by_key[key].append(row)
    joined = joined_sweeps.join_sweeps(rows_by_key)
    ordered = sorted(joined, key=lambda key: (not key[0], key))
    return [Group(key, joined[key], baseline and matching_variant(joined[key], baseline)) for key in ordered]


def _is_lost(row):
    """True if a run failed before its row recorded a device."""
    return not row.ok and not (row.record["provenance"].get("devices") or {}).get("kind")


def matching_variant(rows: Sequence[Row], baseline: str) -> str:
    """The variant that `baseline` names; if several fit its keys, the one with most rows."""
    variants = collections.Counter(row.variant for row in rows)
    if baseline in variants:
        return baseline
    fitting = {row.variant for row in rows if row.fits(baseline)}
    return max((v for v in variants if v in fitting), key=lambda v: variants[v], default=baseline)


def _key(row):
    place = joined_sweeps.ANY_DEVICE if joined_sweeps.measures(row) == joined_sweeps.QUALITY else device(row)
    return row.sweep.get("name") or "", row.kind + (" (predicted)" if row.predicted else ""), place, batch(row)
