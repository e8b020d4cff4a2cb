"""Times of operations from a trace of JAX's profiler, by their names in the compiled program."""

import collections
import pathlib
import warnings
from collections.abc import Iterable, Iterator

import jax

from efficientllm.typing import PathLike

Operation = tuple[str, str]  # an HLO module and the name of an instruction
Span = tuple[float, float, Operation]  # begin and end in ns


def newest_file(folder: PathLike) -> pathlib.Path | None:
    """The newest `.xplane.pb` below a folder, or None."""
    files = pathlib.Path(folder).glob("plugins/profile/*/*.xplane.pb")
    return max(files, key=lambda file: file.stat().st_mtime, default=None)


def seconds_by_operation(file: PathLike, modules: Iterable[str]) -> dict[str, dict[str, float]]:
    """Reads `{module: {operation: seconds}}` of a trace: the means over its devices. CPU devices count as one.

    `modules` are names of HLO modules. Where operations run at once, in threads or streams, each gets an equal share of
    that time, so that the sum over operations is at most the wall time. An operation that runs within another, as the
    body of a loop does, has its time for itself.
    """
    wanted, planes = set(modules), []
    with warnings.catch_warnings():
        # jaxlib makes a type that Python 3.13 deprecates; where warnings are errors the process would abort.
        warnings.simplefilter("ignore", DeprecationWarning)
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            if lines := [spans for line in plane.lines if (spans := list(_spans(plane.name, line, wanted)))]:
                planes.append((plane.name, lines))
    # A GPU's trace has its kernels twice: on the device, and on the host where they are launched.
    on_device = [lines for name, lines in planes if name.startswith("/device:")]
    chosen = on_device or [lines for _, lines in planes]
    seconds: dict[str, dict[str, float]] = {module: collections.defaultdict(float) for module in wanted}
    for lines in chosen:
        for (module, name), nanoseconds in _shares(lines).items():
            seconds[module][name] += nanoseconds / 1e9 / len(chosen)
    return {module: dict(times) for module, times in seconds.items()}


def _spans(plane, line, modules):
    """Yields `(begin, end, (module, operation))` of a line's events."""
    is_device = plane.startswith("/device:")
    if is_device and not (line.name == "XLA Ops" or "Stream" in line.name):  # others repeat these as modules and steps
        return
    for event in line.events:
        stats = dict(event.stats)
        # A TPU's events are named by the text of their instruction, `%fusion.3 = ...`.
        name = stats.get("hlo_op") or (event.name.split(" ")[0].lstrip("%") if is_device else None)
        module = stats.get("hlo_module") or (next(iter(modules)) if is_device and len(modules) == 1 else None)
        if name and module in modules and event.duration_ns > 0:
            yield event.start_ns, event.start_ns + event.duration_ns, (module, name)


def _shares(lines: Iterable[Iterable[Span]]) -> dict[Operation, float]:
    """Nanoseconds of each operation on lines that run at once, each instant divided equally."""
    edges = sorted(
        edge
        for index, spans in enumerate(lines)
        for begin, end, name in _innermost(spans)
        for edge in ((begin, 1, index, name), (end, 0, index, name))
    )
    shares: dict[Operation, float] = collections.defaultdict(float)
    running: dict[int, Operation] = {}
    before = 0.0
    for now, begins, index, name in edges:
        for operation in running.values():
            shares[operation] += (now - before) / len(running)
        before = now
        if begins:
            running[index] = name
        else:
            del running[index]
    return dict(shares)


def _innermost(spans: Iterable[Span]) -> Iterator[Span]:
    """Yields the spans of a line without the parts in which others run within them."""
    stack: list[tuple[float, Operation]] = []
    at = 0.0

    def until(time):
        nonlocal at
        while stack and stack[-1][0] <= time:
            end, name = stack.pop()
            if end > at:
                yield at, end, name
                at = end

    for begin, end, name in sorted(spans, key=lambda span: (span[0], -span[1])):
        yield from until(begin)
        if stack and begin > at:
            yield at, begin, stack[-1][1]
        at = begin
        stack.append((end, name))
    yield from until(float("inf"))
