"""Progress line of a training step: step, loss, tokens/s, time left."""

import collections
import time
from collections.abc import Callable

from efficientllm.runtime.log import clock_time


class Progress:
    """Rate and remaining time, from the last `window` steps."""

    def __init__(self, steps: int, clock: Callable[[], float] = time.monotonic, window: int = 20) -> None:
        self._steps, self._clock = steps, clock
        self._recent: collections.deque[tuple[float, float]] = collections.deque(maxlen=window)

    def add(self, tokens: float) -> None:
        """Adds a finished step of `tokens` tokens."""
        self._recent.append((self._clock(), tokens))

    def tokens_per_s(self) -> float | None:
        """Rate including pauses for evaluation and checkpoints; None before the second step."""
        if len(self._recent) < 2:
            return None
        seconds = self._recent[-1][0] - self._recent[0][0]
        return sum(tokens for _, tokens in list(self._recent)[1:]) / seconds

    def line(self, step: int, loss: float) -> str:
        """`step  120/300  loss 4.321  5,120 tokens/s  0:42 left`."""
        rate = self.tokens_per_s()
        if rate is None:
            return f"step {step:>{len(str(self._steps))}}/{self._steps}  loss {loss:.4f}"
        mean = (self._recent[-1][0] - self._recent[0][0]) / (len(self._recent) - 1)
        return (
            f"step {step:>{len(str(self._steps))}}/{self._steps}  loss {loss:.4f}  {rate:,.0f} tokens/s  "
            f"{clock_time((self._steps - step) * mean)} left"
        )
