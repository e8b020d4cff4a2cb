"""Calibration of plans: the ratio of measured times to rooflines, from rows of runs on the same hardware."""

import dataclasses
import json
import logging
import math
import pathlib
import statistics

from ml_collections import ConfigDict

from efficientllm.config.plain import with_added_keys
from efficientllm.errors import UserError, short_repr
from efficientllm.plan import estimate
from efficientllm.plan import hardware as hardwares
from efficientllm.plan.hardware import Hardware
from efficientllm.plan.workloads import WorkloadKind
from efficientllm.record import provenance
from efficientllm.record.row import read_record
from efficientllm.runtime.atomic_write import write_atomically
from efficientllm.typing import PathLike, Record
from efficientllm.untrusted import files, json_text


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Measured rows of one hardware, with the roofline of each.

    tasks:  the tasks (`config.task`) of the rows.
    rows:   `{"path", "measured_s", "roofline_s", "watts", "pcu"}` each; watts and pcu are of one device, or None.
    """

    hardware: str
    tasks: tuple
    rows: tuple

    @property
    def factor(self) -> float:
        """Geometric mean of measured time over roofline time."""
        return _factor(self.rows)

    @property
    def errors(self) -> list[float]:
        """Leave-one-out errors: relative error of each row's time, predicted from the other rows; empty for one row."""
        rows = self.rows
        if len(rows) < 2:
            return []
        others = [_factor(rows[:i] + rows[i + 1 :]) for i in range(len(rows))]
        return [factor * row["roofline_s"] / row["measured_s"] - 1 for row, factor in zip(rows, others, strict=True)]

    def mean(self, key: str) -> float | None:
        """The mean of `watts` or `pcu` over the rows that have it; None if none has."""
        values = [row[key] for row in self.rows if row.get(key) is not None]
        return statistics.fmean(values) if values else None

    def summary(self) -> Record:
        """The `calibration` entry of a plan's row."""
        errors = [abs(error) for error in self.errors]
        return {
            "rows": len(self.rows),
            "factor": self.factor,
            "median_error": statistics.median(errors) if errors else None,
            "worst_error": max(errors, default=None),
        }


def _factor(rows):
    return math.exp(statistics.fmean(math.log(row["measured_s"] / row["roofline_s"]) for row in rows))


def load(
    path: PathLike, hardware: Hardware, planned: WorkloadKind, log: logging.Logger, keep: pathlib.Path
) -> Calibration:
    """Loads the Calibration of `config.plan.calibration`: a file written by this function, or a folder of runs.

    `planned` is a kind of workload. For a folder the step of each row is compiled, and the result is written to
    the file `keep`. Raises UserError for a file of other hardware or task, and a folder without usable rows.
    """
    file, where = pathlib.Path(path).expanduser(), f"config.plan.calibration = {path!r}"
    if not files.is_there(file):
        raise UserError(f"{where}: no such file or folder")
    if file.is_dir() or file.name == "record.json":
        calibration = measure(file, hardware, planned, log)
        write_atomically(keep, json.dumps(dataclasses.asdict(calibration), indent=2))
        return calibration
    calibration = _read(file, f"{where}: no calibration")
    if (calibration.hardware, calibration.tasks) != (hardware.name, planned.tasks) or not calibration.rows:
        raise UserError(
            f"config.plan.calibration = {path!r} is of {' or '.join(calibration.tasks)} on {calibration.hardware}, "
            f"not of {' or '.join(planned.tasks)} on {hardware.name}"
        )
    return calibration


def _read(file, where):
    """Reads and checks a file: times above 0, watts and pcu numbers or null. Raises UserError."""
    content = json_text.read(file, where=where)
    rows = json_text.field(content, "rows", list, where)
    for index, row in enumerate(rows):
        place = f"{where}: row {index}"
        if not isinstance(row, dict):
            raise UserError(f"{place} is {short_repr(row)}, no object")
        for key in ("measured_s", "roofline_s"):
            if json_text.field(row, key, "number", place) <= 0:
                raise UserError(f"{place}: {key} = {row[key]} must be more than 0")
        for key in ("watts", "pcu"):
            if row.get(key) is not None:
                json_text.field(row, key, "number", place)
    tasks = json_text.field(content, "tasks", list, where)
    return Calibration(json_text.field(content, "hardware", str, where), tuple(map(str, tasks)), tuple(rows))


def measure(folder: pathlib.Path, hardware: Hardware, planned: WorkloadKind, log: logging.Logger) -> Calibration:
    """Makes the Calibration of all usable rows in a folder, or of one record.json. Raises UserError without any."""
    rows = []
    for file in [folder] if folder.is_file() else sorted(folder.rglob("record.json")):
        record = read_record(file)
        if _usable(record, hardware, planned):
            rows.append(_row(file, record, hardware, planned))
            log.info(
                f"calibration: {file.parent}: {rows[-1]['measured_s'] / rows[-1]['roofline_s']:.2f} x its roofline"
            )
    if not rows:
        raise UserError(
            f"config.plan.calibration = {str(folder)!r} holds no timed row of "
            f"{' or '.join(planned.tasks)} on {hardware.name}"
        )
    return Calibration(hardware.name, planned.tasks, tuple(rows))


def _usable(record, hardware, planned):
    devices = record["provenance"]["devices"]
    same = devices["kind"] == hardware.device_kind
    if hardware.platform == "cpu":
        same &= record["provenance"]["host"]["processor"] == provenance.processor()
    return (
        same and record["task"] in planned.tasks and record["outcome"] == "ok" and record["paper"]["al_s"] is not None
    )


def _row(file, record, hardware, planned):
    device_count, mesh = record["provenance"]["devices"]["count"], record["provenance"]["mesh"]
    count = math.prod(mesh.values())  # the devices of the run's mesh; the process may have more
    config = ConfigDict(_tuples(with_added_keys(record["config"])))
    workload = planned.describe(config, hardwares.devices(hardware, count), hardware.platform, hardware.capability)
    roofline_s = estimate.estimate(workload, hardware, count).roofline.seconds
    watts = record["paper"]["aec_w"]
    return {
        "path": str(file.parent),
        "measured_s": record["paper"]["al_s"],
        "roofline_s": roofline_s,
        "watts": None if watts is None else watts / device_count,
        "pcu": record["paper"]["pcu"],
    }


def _tuples(value):
    """Converts lists, of JSON, to the tuples of a config."""
    if isinstance(value, dict):
        return {key: _tuples(entry) for key, entry in value.items()}
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value
