"""Progress line of a training step: step, loss, tokens or images a second, time left."""

import collections
import time
from collections.abc import Callable

from efficientllm.runtime.log import clock_time


class Progress:
    """Rate of `unit` and remaining time, from the last `window` steps."""

    def __init__(
        self, steps: int, clock: Callable[[], float] = time.monotonic, window: int = 20, unit: str = "tokens"
    ) -> None:
        self._steps, self._clock, self.unit = steps, clock, unit
        self._recent: collections.deque[tuple[float, float]] = collections.deque(maxlen=window)

    def add(self, count: float) -> None:
        """Adds a finished step of `count` tokens, or of another unit."""
        self._recent.append((self._clock(), count))

    def rate(self) -> float | None:
        """Rate including pauses for evaluation and checkpoints; None before the second step."""
        if len(self._recent) < 2:
            return None
        seconds = self._recent[-1][0] - self._recent[0][0]
        return sum(count for _, count in list(self._recent)[1:]) / seconds

    def line(self, step: int, loss: float) -> str:
        """`step  120/300  loss 4.321  5,120 tokens/s  0:42 left`."""
        rate = self.rate()
        if rate is None:
            return f"step {step:>{len(str(self._steps))}}/{self._steps}  loss {loss:.4f}"
        mean = (self._recent[-1][0] - self._recent[0][0]) / (len(self._recent) - 1)
        return (
            f"step {step:>{len(str(self._steps))}}/{self._steps}  loss {loss:.4f}  {rate:,.0f} {self.unit}/s  "
            f"{clock_time((self._steps - step) * mean)} left"
        )
