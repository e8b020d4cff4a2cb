"""Planning: a config's step of training or request, compiled for hardware that is not here, and a row of its cost."""

import logging

import jax

from efficientllm import sharding
from efficientllm.errors import UserError
from efficientllm.metrics.energy.window import EnergyReader
from efficientllm.plan import calibration, estimate, hardware, remedies, row, training_step
from efficientllm.registry import lookup, register
from efficientllm.tasks.base import Run

log = logging.getLogger("efficientllm")


@register("task", "plan")
def plan(config, workdir):
    """Plans what `config.plan.of` names -> exit status, 0 whether it fits or not. Raises UserError."""
    if jax.distributed.is_initialized():
        raise UserError("config.task = 'plan': one process plans for any number of devices; start it alone")
    return Planning.execute(config, workdir)


def before_devices(config):
    """Says what this process compiles for before it starts its devices. Raises UserError."""
    hardware.compile_only(*_asked(config.plan))


plan.before_devices = before_devices


def _asked(asked):
    """(hardware, number of devices) of `config.plan`."""
    found = hardware.find(asked.hardware, max(1, asked.devices))
    hardware.check_count(found, asked.devices)
    return found, asked.devices


class Planning(Run):
    """One plan from config to row."""

    def __init__(self, config, workdir):
        super().__init__(config, workdir)
        self.hardware, self.count = _asked(config.plan)
        self.calibration_of = config.plan.calibration
        self.devices = hardware.devices(self.hardware, self.count)
        self.asked, self.planned = config, lookup("planned", config.plan.of, where="config.plan.of")
        self.config = self.planned.whole(config, sharding.make_mesh(config.mesh, self.devices))

    def run(self):
        """Returns the exit status."""
        self._say_what_is_different()
        one = self._described({})
        self.workdir.claim(self.config, self.asked)
        found = estimate.estimate(one, self.hardware, self.count)
        known = None
        if self.calibration_of:
            keep = self.workdir.path / "calibration.json"
            known = calibration.load(self.calibration_of, self.hardware, self.planned, log, keep)
        made = row.predicted(one, self.hardware, self.count, found, self._tries(one, found), known)
        log.info(row.text(self.config.name, one, self.hardware, found, made))
        self._write(one, found, made)
        return 0

    def _say_what_is_different(self):
        size, asked = self.config.train.batch_size, self.asked.train.batch_size
        if size != asked:
            log.info(
                f"config.train.batch_size = {asked} does not divide over {self.count} devices: planned with {size}"
            )
        if not self.hardware.has_compiler:
            log.info(f"{self.hardware.lacks}. What follows is from shapes alone")

    def _described(self, change):
        config = training_step.changed(self.config, change)
        return self.planned.describe(config, self.devices, self.hardware.platform, self.hardware.capability)

    def _tries(self, one, found):
        """What was tried where the step does not fit."""
        room = self.hardware.memory_bytes
        if found.refused is None and (found.total_bytes is None or found.total_bytes <= room):
            return []
        log.info("does not fit; trying single changes")

        def total_of(change):
            return estimate.total_bytes(self._described(change), self.hardware)

        return remedies.attempt(one.candidates(), room, total_of)

    def _write(self, one, found, made):
        """Writes the row: its devices are those that were planned for, in the place of those that are here."""
        reader = EnergyReader("a plan reads no energy")
        record = self.build_row(
            "ok",
            reader=reader,
            mesh=one.mesh,
            kernels=found.kernels,
            physical=row.physical(one, found),
            predicted=made,
        )
        planned = {"platform": self.hardware.platform, "kind": self.hardware.device_kind, "count": self.count}
        record["provenance"]["devices"] = dict.fromkeys(record["provenance"]["devices"]) | planned
        self.write_row(record)
        log.info(f"row: {self.workdir.shown / 'record.json'}")
