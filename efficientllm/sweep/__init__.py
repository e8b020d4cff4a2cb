"""Many runs, each a fresh process, whose rows can be compared: `python -m efficientllm.sweep --config=FILE`."""

from efficientllm.sweep.spec import Sweep

__all__ = ["SHORT_RUNS", "Sweep"]

# Overrides of sweeps of short runs on a CPU: nothing is evaluated, saved or sampled on the way.
SHORT_RUNS = {"train.batch_size": 4, "eval.every": 0, "eval.batches": 16, "checkpoint.every": 0, "sample.tokens": 1}
