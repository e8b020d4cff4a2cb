"""Which rows may stand in one ranking, and what the ranking says.

Rows of one sweep, task, device and effective batch form a Group. Inside it a measured metric asks for more (see
`comparable`): equal training, for energy the same scope, for memory the same allocator, for times a machine that was
the run's own, or the same randomised block. A variant that differs from the baseline there is shown with the reason,
and without ratio or rank. A verdict whose interval lies within what the baseline shows against itself is withheld.
"""

import collections
import math

import numpy as np

from efficientllm.report import columns, comparable, ranking, statistics
from efficientllm.report.comparable import batch, device

__all__ = ["Group", "batch", "device", "groups"]


_DRAWS_OF_MANY = 2000


class Group:
    """Rows that share a ranking. `baseline` is a variant's name, or None where no row of it is here."""

    def __init__(self, key, rows, baseline=None):
        self.sweep, self.task, self.device, self.batch = key
        self.rows = sorted(rows, key=lambda row: (row.block, row.order, row.started, str(row.path)))
        self.variants = list(dict.fromkeys(row.variant for row in sorted(rows, key=lambda row: row.started)))
        named = baseline or next((row.baseline for row in self.rows if row.baseline), None)
        ended_well = [v for v in self.variants if any(row.ok for row in rows if row.variant == v)]
        self.baseline = named if named in self.variants else (None if named else (ended_well or self.variants)[0])
        self.variants.sort(key=lambda variant: variant != self.baseline)
        self.blocks = list(dict.fromkeys(row.block for row in self.rows if row.ok))
        self.measured = [row for row in self.rows if row.ok and not row.predicted]
        self._of = collections.defaultdict(list)
        for row in self.rows:
            self._of[row.variant].append(row)
        self._noise = {}

    @property
    def name(self):
        parts = (self.sweep, self.task, self.device, self.batch)
        return " · ".join(part for part in parts if part)

    def of(self, variant):
        return self._of.get(variant, [])

    def _measured(self, variant):
        return [row for row in self.of(variant) if row.ok and not row.predicted]

    def refusal(self, variant, key):
        """Why this variant's metric is neither compared nor ranked, or None."""
        rows = self._measured(variant)
        if any(row.predicted for row in self.of(variant)):
            return "predicted, not measured"
        if not rows:
            return f"no run ended well ({', '.join(sorted({row.outcome for row in self.of(variant)}))})"
        known = [row for row in rows if row.values.get(key) is not None]
        if not known:
            return rows[0].reasons.get(key, "not recorded")
        if self.baseline is None:
            return "the baseline has no row here"
        reference = [row for row in self._measured(self.baseline) if row.values.get(key) is not None]
        if not reference:
            return f"the baseline's is null: {self._why_null(key)}"
        if any(row.values[key] <= 0 for row in known + reference):
            return "not positive in every row: no ratio"
        if among := comparable.differences(reference, reference[0], key, "another row's of it"):
            return f"the baseline's rows are not alike: {among}"
        return comparable.differences(known, reference[0], key) or self._unquiet(known + reference, key)

    def _unquiet(self, rows, key):
        """Why times of starved rows say nothing here, or None: in a sweep's blocks, what disturbs one disturbs all."""
        if not columns.is_timed(key) or comparable.in_blocks(self.measured):
            return None
        return comparable.starved(rows)

    def _why_null(self, key):
        rows = self.of(self.baseline)
        return next((row.reasons[key] for row in rows if key in row.reasons), "no run of it ended well")

    def logs(self, key, variants):
        """`logs_VB`: log-ratios to the mean of the block's baselines; NaN where a block lacks one or the other."""
        logs_VB = np.full((len(variants), len(self.blocks)), np.nan)
        reference = self._means(self.baseline, key)
        for v, variant in enumerate(variants):
            for block, mean in self._means(variant, key).items():
                if block in reference:
                    logs_VB[v, self.blocks.index(block)] = mean - reference[block]
        return logs_VB

    def _means(self, variant, key):
        found = collections.defaultdict(list)
        for row in self._measured(variant):
            if (row.values.get(key) or 0) > 0:
                found[row.block].append(math.log(row.values[key]))
        return {block: sum(logs) / len(logs) for block, logs in found.items()}

    def between(self, key, variant, other):
        """`(Interval of variant over other or None, reason or None)`: paired in every block that holds both."""
        reason = self.refusal(variant, key) or self.refusal(other, key)
        if reason:
            return None, reason
        a, b = self._means(variant, key), self._means(other, key)
        shared = [block for block in self.blocks if block in a and block in b]
        if not shared:
            return None, "no block holds both"
        logs_B = [a[block] - b[block] for block in shared]
        return statistics.ratio_interval(logs_B, columns.is_exact(key)), None

    def compare(self, key, better):
        """`{variant: cell}` and `wins` (`{variant: {variant: share}}`) of a metric; every number a plain one.

        What says how a run was measured (its conditions) is shown and compared with nothing.
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
            ranked, ranking.ranks(np.nanmean(logs_VB, 1), draws_RV, better, floor), strict=True
        ):
            cells[variant] |= {"rank": rank, "rank_low": low if sure else None, "rank_high": high if sure else None}
        if not sure or many:
            return cells, {}
        wins_VV = ranking.wins(draws_RV, better, floor)
        return cells, {a: dict(zip(ranked, row, strict=True)) for a, row in zip(ranked, wins_VV.tolist(), strict=True)}

    def _floor(self, key, cells):
        """The difference in logs that ranks take for a tie: none, or the noise where it has withheld a verdict."""
        noisy = any(cell.get("verdict", "").startswith("withheld") for cell in cells.values())
        return statistics.reach(self.noise(key)) if noisy else 0.0

    def ranked(self, key):
        """The variants that this metric ranks: compared with the baseline in at least one block."""
        able = [variant for variant in self.variants if self.refusal(variant, key) is None]
        if not able:
            return []
        return [v for v, row in zip(able, np.isfinite(self.logs(key, able)).any(1), strict=True) if row]

    def is_sure(self, key, variants):
        """Whether draws of these variants say anything: two blocks each, or values that need only one."""
        return columns.is_exact(key) or bool((np.isfinite(self.logs(key, variants)).sum(1) > 1).all())

    def _shown(self, variant, key, reason=None):
        values = [row.values[key] for row in self.of(variant) if row.ok and row.values.get(key) is not None]
        if not values and reason is None:
            reason = next((row.reasons[key] for row in self.of(variant) if key in row.reasons), "not recorded")
        return {"mean": statistics.centre(values), "n": len(values), "reason": reason}

    def _cell(self, variant, key, reason, better):
        cell = self._shown(variant, key, reason)
        if (
            cell["n"]
            and columns.is_timed(key)
            and (count := sum(bool(row.starved) for row in self.of(variant) if row.ok))
        ):
            cell["starved"] = count
        if reason or variant == self.baseline:
            return cell
        logs_B = self.logs(key, [variant])[0]
        interval = statistics.ratio_interval(logs_B[np.isfinite(logs_B)], columns.is_exact(key))
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

    def withheld(self, key, interval, limit=1.0):
        """Why nothing is said of an interval against `limit`, or None; see `statistics.within_noise`."""
        found = None if columns.is_exact(key) or interval is None else self.noise(key)
        if found is None or not statistics.within_noise(interval, found, limit):
            return None
        low, high = found.interval.low, found.interval.high
        floor = statistics.WIDE if statistics.is_wide(low, high) else f"{low:.3f} to {high:.3f} of itself"
        return f"withheld: within the noise floor, which is the baseline at {floor}"

    def noise(self, key):
        """The statistics.Noise of the baseline against itself, or None where no block holds it twice.

        Pairs are the first and the last baseline of a block, or a variant of the very same config.
        """
        if key not in self._noise:
            self._noise[key] = self._find_noise(key)
        return self._noise[key]

    def _find_noise(self, key):
        pairs, baselines = [], 1
        rows = [row for row in self._measured(self.baseline) if (row.values.get(key) or 0) > 0]
        for block in self.blocks:
            own = [row.values[key] for row in rows if row.block == block]
            if len(own) > 1:
                pairs.append(math.log(own[-1] / own[0]))
                baselines = 2
        for variant in self.twins():
            if not pairs and self.refusal(variant, key) is None:
                logs_B = self.logs(key, [variant])[0]
                pairs = logs_B[np.isfinite(logs_B)].tolist()
        return statistics.noise(pairs, baselines, len(self.blocks))

    def twins(self):
        """Variants whose config is the baseline's: what the harness sees between them is noise."""
        identities = {row.identity for row in self.rows if row.variant == self.baseline}
        return [v for v in self.variants if v != self.baseline and {row.identity for row in self.of(v)} == identities]


def groups(rows, baseline=None):
    """The Groups of these rows, rows of a sweep first.

    `baseline` is a variant, or keys and values of its config (`model.mixer=gqa`). A run that failed before it knew its
    device belongs to the groups of its sweep; without one it ranks nowhere.
    """
    found = collections.defaultdict(list)
    for row in rows:
        if not _is_lost(row):
            found[_key(row)].append(row)
    for row in filter(_is_lost, rows):
        for key in [key for key in found if row.sweep and key[0] == row.sweep.get("name")]:
            found[key].append(row)
    ordered = sorted(found, key=lambda key: (not key[0], key))
    return [Group(key, found[key], baseline and fitting(found[key], baseline)) for key in ordered]


def _is_lost(row):
    """Whether a run failed before its row could say what it ran on."""
    return not row.ok and not (row.record["provenance"].get("devices") or {}).get("kind")


def fitting(rows, baseline):
    """The variant among these rows that `baseline` names; of several that fit its keys the one of most rows."""
    variants = collections.Counter(row.variant for row in rows)
    if baseline in variants:
        return baseline
    able = {row.variant for row in rows if row.fits(baseline)}
    return max((v for v in variants if v in able), key=lambda v: variants[v], default=baseline)


def _key(row):
    return row.sweep.get("name") or "", row.kind + (" (predicted)" if row.predicted else ""), device(row), batch(row)
