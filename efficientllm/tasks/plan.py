"""The plan task: compiles a training step or request for hardware that is not attached, and writes its cost."""

import logging

import jax

from efficientllm import sharding
from efficientllm.config.field_keys import name_keys
from efficientllm.errors import UserError
from efficientllm.metrics.energy.window import EnergyReader
from efficientllm.plan import calibration as calibrations
from efficientllm.plan import estimate as estimates
from efficientllm.plan import hardware, remedies, row, workloads
from efficientllm.record.workdir import Workdir
from efficientllm.registry import lookup, register
from efficientllm.tasks.base import Run
from efficientllm.typing import Config

log = logging.getLogger("efficientllm")


def _hardware_and_count(plan_config):
    """`(hardware, number of devices)` of `config.plan`."""
    planned_hardware = hardware.find(plan_config.hardware, max(1, plan_config.devices))
    hardware.check_count(planned_hardware, plan_config.devices)
    return planned_hardware, plan_config.devices


@register("task", "plan")
class Planning(Run):
    """Plan of what `config.plan.of` names. Its exit status is 0 whether that fits or not.

    `config` is `requested_config` with a batch size that the mesh divides.
    """

    @classmethod
    def before_devices(cls, config: Config) -> None:
        """Sets the platform that this process compiles for. Raises UserError."""
        if jax.distributed.is_initialized():
            raise UserError("config.task = 'plan': one process plans for any number of devices; start it alone")
        hardware.compile_only(*_hardware_and_count(config.plan))

    def __init__(self, config: Config, workdir: Workdir) -> None:
        super().__init__(config, workdir)
        self.hardware, self.count = _hardware_and_count(config.plan)
        self.calibration_of = config.plan.calibration
        self.devices = hardware.devices(self.hardware, self.count)
        self.requested_config = config
        self.planned = lookup("planned", config.plan.of, where="config.plan.of")
        self.config = self.planned.whole(config, sharding.make_mesh(config.mesh, self.devices))

    def run(self) -> int:
        """Writes the plan -> exit status."""
        self._log_adjustments()
        workload = self._describe({})
        self.workdir.claim(self.config, self.requested_config)
        estimate = estimates.estimate(workload, self.hardware, self.count)
        calibration = None
        if self.calibration_of:
            keep = self.workdir.path / "calibration.json"
            calibration = calibrations.load(self.calibration_of, self.hardware, self.planned, log, keep)
        prediction = row.predicted(
            workload, self.hardware, self.count, estimate, self._tries(workload, estimate), calibration
        )
        log.info(row.text(self.config.name, workload, self.hardware, estimate, prediction))
        self._write(workload, estimate, prediction)
        return 0

    def _log_adjustments(self):
        batch_size, requested = self.config.train.batch_size, self.requested_config.train.batch_size
        if batch_size != requested:
            log.info(
                f"config.train.batch_size = {requested} does not divide over {self.count} devices: "
                f"planned with {batch_size}"
            )
        if not self.hardware.has_compiler:
            log.info(f"{self.hardware.lacks}. What follows is from shapes alone")

    def _describe(self, change):
        config = workloads.with_changes(self.config, change)
        with name_keys(config):
            return self.planned.describe(config, self.devices, self.hardware.platform, self.hardware.capability)

    def _tries(self, workload, estimate):
        """The config changes that were tried; none where the workload fits."""
        room = self.hardware.memory_bytes
        if estimate.refused is None and (estimate.total_bytes is None or estimate.total_bytes <= room):
            return []
        log.info("does not fit; trying single changes")

        def total_of(change):
            return estimates.total_bytes(self._describe(change), self.hardware)

        return remedies.attempt(workload.candidates(), room, total_of)

    def _write(self, workload, estimate, prediction):
        """Writes the row; its devices are those of the plan, not those of this process."""
        reader = EnergyReader("a plan reads no energy")
        with workloads.compile_target(self.hardware.platform, self.hardware.capability):
            record = self.build_row(
                "ok",
                reader=reader,
                mesh=workload.mesh,
                kernels=estimate.kernels,
                physical=row.physical(workload, estimate),
                predicted=prediction,
            )
        planned = {"platform": self.hardware.platform, "kind": self.hardware.device_kind, "count": self.count}
        record["provenance"]["devices"] = dict.fromkeys(record["provenance"]["devices"]) | planned
        self.write_row(record)
        log.info(f"row: {self.workdir.shown / 'record.json'}")
