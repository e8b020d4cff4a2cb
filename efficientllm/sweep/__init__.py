"""Many runs, each a fresh process, whose rows can be compared: `python -m efficientllm.sweep --config=FILE`."""

from efficientllm.sweep.spec import Sweep

__all__ = ["Sweep"]
