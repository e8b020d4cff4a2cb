"""What training, inference and planning share: log, charts, row with provenance, failures, exit status."""

import contextlib
import logging
import sys
import time
import traceback
import typing

from efficientllm import weights
from efficientllm.config.plain import config_hash, flatten, plain
from efficientllm.cost import device_peaks
from efficientllm.metrics.energy.window import EnergyReader
from efficientllm.record import price_and_carbon, provenance
from efficientllm.record.row import build_record
from efficientllm.record.tensorboard import SummaryWriter
from efficientllm.record.workdir import Workdir
from efficientllm.registry.plugins import one_line_with_location
from efficientllm.runtime import distributed
from efficientllm.runtime.log import close_log, open_log
from efficientllm.typing import Config, Mesh, Record

log = logging.getLogger("efficientllm")
FAILED = 3  # exit status of a run whose row says how it failed


class Run:
    """One run of a task, from its config to its row; `run()` of a subclass does the work and returns the exit status.

    Only the main process writes the log, the charts and the row. `notes` are lines that the row keeps.
    """

    def __init__(self, config: Config, workdir: Workdir) -> None:
        self.config, self.workdir, self.started = config, workdir, time.time()
        self.is_main = distributed.is_main()
        self.writer: SummaryWriter | None = None
        self.notes: list[str] = []

    @classmethod
    def before_devices(cls, config: Config) -> None:
        """Prepares the process before JAX starts its devices. Raises UserError."""

    @classmethod
    def execute(cls, config: Config, workdir: Workdir) -> int:
        """Runs the task with its log open -> exit status. Raises UserError."""
        open_log(workdir.path / "log.txt" if distributed.is_main() else None)
        try:
            with contextlib.closing(cls(config, workdir)) as task_run:
                return task_run.run()
        finally:
            close_log()

    def run(self) -> int:
        """Does the work -> exit status."""
        raise NotImplementedError

    def close(self) -> None:
        """Closes the charts."""
        if self.writer:
            with contextlib.suppress(OSError):  # the full disk was logged already
                self.writer.close()
        self.writer = None

    def build_row(
        self,
        outcome: str,
        *,
        reader: EnergyReader,
        mesh: Mesh | None = None,
        kernels: dict[str, list[str]] | None = None,
        facts: Record | None = None,
        error: str | None = None,
        **groups: typing.Any,
    ) -> Record:
        """The row: `facts` are added to its provenance, `groups` are those of `build_record`.

        What was measured on a mesh is joined by what it cost (`record.price_and_carbon`).
        """
        if mesh is not None and groups.get("paper_readings"):
            paid = device_peaks.count_parallel(list(mesh.devices.flat))
            amounts = price_and_carbon.of_row(self.config, groups["paper_readings"], groups["physical"], paid)
            groups["physical"] = groups["physical"] | amounts
        source = provenance.provenance(
            reader=reader,
            started=self.started,
            ended=time.time(),
            config_hash=config_hash(self.config),
            seed=self.config.seed,
            mesh=mesh,
            kernels=kernels,
        )
        if self.config.model.precision == weights.AUTO:
            source["precision"] = weights.choose_precision()._asdict()
        record = build_record(
            outcome=outcome,
            name=self.config.name,
            task=self.config.task,
            config=plain(self.config),
            provenance=source | (facts or {}) | self.workdir.code_provenance(),
            **groups,
        )
        if error:
            record["error"] = error
        if self.notes:
            record["notes"] = self.notes
        return record

    def write_row(self, record: Record) -> Record:
        """Writes `record.json` in the main process -> the row."""
        if self.is_main:
            self.workdir.write_row(record)
        return record

    def open_charts(self, first_step: int = 0) -> None:
        """Opens TensorBoard's event file, whose first text is the config."""
        self.writer = SummaryWriter(self.workdir.path, first_step=first_step)
        values = flatten(plain(self.config)).items()
        self.writer.text("config", "\n".join(f"    {key} = {value!r}" for key, value in values))

    def add_to_table(self, record: Record) -> None:
        """Adds the run to TensorBoard's HParams table."""
        self.writer.hparams(flatten(plain(self.config)), record["paper"] | record["quality"])

    def log_locations(self) -> None:
        """Logs where the row is, and how to compare runs."""
        log.info(f"row: {self.workdir.shown / 'record.json'}")
        log.info(f"compare runs: tensorboard --logdir={self.workdir.siblings}")

    def end(self, error: BaseException) -> int:
        """Ends a run whose task raised: one line on stderr, the traceback in `log.txt`, and a row -> exit status."""
        line = one_line_with_location(error)
        print(f"efficientllm: {line}; the traceback is in {self.workdir.shown / 'log.txt'}", file=sys.stderr)
        if self.is_main:
            try:
                with open(self.workdir.path / "log.txt", "a", encoding="utf-8", errors="replace") as file:
                    file.write("".join(traceback.format_exception(error)))
                self.write_row(self.build_row("error", reader=EnergyReader("the run ended as error"), error=line))
            except OSError as unwritable:
                print(f"efficientllm: no row could be written: {unwritable}", file=sys.stderr)
        return FAILED
