"""An exception of a technique as one line that names the place in the user's code, and as a row."""

import contextlib
import logging
import sys
import time
import traceback

from efficientllm.config.plain import config_hash, plain
from efficientllm.errors import UserError
from efficientllm.metrics.energy.window import EnergyReader
from efficientllm.record import provenance, row
from efficientllm.registry.plugins import one_line_with_location
from efficientllm.runtime import distributed

log = logging.getLogger("efficientllm")
FAILED = 3


def end(error, config, workdir, started, outcome="error"):
    """Writes the row of a run that ended by an exception, the traceback into `log.txt`, and one line -> exit status."""
    line = one_line_with_location(error)
    print(f"efficientllm: {line}; the traceback is in {workdir.shown / 'log.txt'}", file=sys.stderr)
    if distributed.is_main():
        try:
            with open(workdir.path / "log.txt", "a", encoding="utf-8", errors="replace") as file:
                file.write("".join(traceback.format_exception(error)))
            workdir.write_row(_row(config, workdir, started, outcome) | {"error": line})
        except OSError as unwritable:
            print(f"efficientllm: no row could be written: {unwritable}", file=sys.stderr)
    return FAILED


def _row(config, workdir, started, outcome):
    said = provenance.provenance(
        reader=EnergyReader(f"the run ended as {outcome}"),
        started=started,
        ended=time.time(),
        config_hash=config_hash(config),
        seed=config.seed,
    )
    return row.build_record(
        outcome=outcome,
        name=config.name,
        task=config.task,
        config=plain(config),
        provenance=said | workdir.code_provenance(),
    )


@contextlib.contextmanager
def optional(what, notes=None):
    """What is done inside may fail: the run has its row, and a warning (and `notes`, a list) says what it lacks."""
    try:
        yield
    except Exception as error:
        warn(what, error)
        if notes is not None:
            notes.append(f"{what}: {_said(error)}")


def warn(what, error):
    """One warning line for something optional that failed."""
    log.warning(f"{what}: {_said(error)}")


def _said(error):
    """A UserError says what it is; others are named with their place."""
    return str(error) if isinstance(error, UserError) else one_line_with_location(error)
