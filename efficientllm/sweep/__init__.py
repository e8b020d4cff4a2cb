"""Sweeps: comparisons of variants, each run in a fresh process: `python -m efficientllm.sweep --config=FILE`."""

from efficientllm.sweep.spec import Sweep

__all__ = ["SHORT_RUNS", "Sweep"]

# Overrides for sweeps of short CPU runs: no evaluation, checkpoint or sample before the end.
SHORT_RUNS = {"train.batch_size": 4, "eval.every": 0, "eval.batches": 16, "checkpoint.every": 0, "sample.tokens": 1}
