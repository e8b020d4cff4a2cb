"""Reading of the time of a compilation, which a run does not have whose programs were compiled by an earlier one."""

from efficientllm.metrics.reading import Reading, missing
from efficientllm.runtime import compile_cache


def reading(seconds: float, source: str, loads: int | None = None) -> Reading:
    """Returns the Reading `seconds`, or null if programs were loaded: `loads` of them, None for those of the run."""
    loads = compile_cache.loads() if loads is None else loads
    return missing("s", compile_cache.LOADED) if loads else Reading(seconds, "s", source)
