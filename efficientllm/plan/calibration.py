"""Measured rows beside the rooflines of their own steps: by how much real steps are slower, and how surely."""

import dataclasses
import json
import math
import pathlib
import statistics

from ml_collections import ConfigDict

from efficientllm.errors import UserError, shown
from efficientllm.plan import estimate
from efficientllm.plan import hardware as hardwares
from efficientllm.record import provenance
from efficientllm.record.row import read_record
from efficientllm.runtime.atomic_write import write_atomically
from efficientllm.untrusted import files, json_text


@dataclasses.dataclass(frozen=True)
class Calibration:
    """`rows`: `{"path", "measured_s", "roofline_s", "watts", "pcu"}` each; watts and pcu are a device's, or None.

    `tasks` are those that rows of one calibration may be of."""

    hardware: str
    tasks: tuple
    rows: tuple

    @property
    def factor(self):
        """Geometric mean of measured over least time."""
        return _factor(self.rows)

    @property
    def errors(self):
        """The relative error of each row's time as predicted from the others; empty for a single row."""
        rows = self.rows
        if len(rows) < 2:
            return []
        others = [_factor(rows[:i] + rows[i + 1 :]) for i in range(len(rows))]
        return [factor * row["roofline_s"] / row["measured_s"] - 1 for row, factor in zip(rows, others, strict=True)]

    def mean(self, key):
        """The mean of what rows measured, None where none did."""
        found = [row[key] for row in self.rows if row.get(key) is not None]
        return statistics.fmean(found) if found else None

    def summary(self):
        """What a plan's row says of it."""
        errors = [abs(error) for error in self.errors]
        return {
            "rows": len(self.rows),
            "factor": self.factor,
            "median_error": statistics.median(errors) if errors else None,
            "worst_error": max(errors, default=None),
        }


def _factor(rows):
    return math.exp(statistics.fmean(math.log(row["measured_s"] / row["roofline_s"]) for row in rows))


def load(path, hardware, planned, log, keep):
    """The Calibration of `config.plan.calibration`: a file written here before, or a folder of runs on this hardware.

    `planned` is a `steps.Planned`. From a folder each row's own step is compiled, and the result is kept as
    the file `keep`. Raises UserError where there is nothing to calibrate with.
    """
    file, where = pathlib.Path(path).expanduser(), f"config.plan.calibration = {path!r}"
    if not files.is_there(file):
        raise UserError(f"{where}: no such file or folder")
    if file.is_dir() or file.name == "record.json":
        found = measure(file, hardware, planned, log)
        write_atomically(keep, json.dumps(dataclasses.asdict(found), indent=2))
        return found
    found = _read(file, f"{where}: no calibration")
    if (found.hardware, found.tasks) != (hardware.name, planned.tasks) or not found.rows:
        own, asked = (
            (name, " or ".join(tasks))
            for name, tasks in ((found.hardware, found.tasks), (hardware.name, planned.tasks))
        )
        raise UserError(
            f"config.plan.calibration = {path!r} is of {own[1]} on {own[0]}, not of {asked[1]} on {asked[0]}"
        )
    return found


def _read(file, where):
    """The Calibration in a file, of times that can be divided and of watts that are numbers or null."""
    held = json_text.read(file, where=where)
    rows = json_text.field(held, "rows", list, where)
    for index, row in enumerate(rows):
        place = f"{where}: row {index}"
        if not isinstance(row, dict):
            raise UserError(f"{place} is {shown(row)}, no object")
        for key in ("measured_s", "roofline_s"):
            if json_text.field(row, key, "number", place) <= 0:
                raise UserError(f"{place}: {key} = {row[key]} must be more than 0")
        for key in ("watts", "pcu"):
            if row.get(key) is not None:
                json_text.field(row, key, "number", place)
    tasks = json_text.field(held, "tasks", list, where)
    return Calibration(json_text.field(held, "hardware", str, where), tuple(map(str, tasks)), tuple(rows))


def measure(folder, hardware, planned, log):
    """The Calibration of the measured rows below a folder."""
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
    read, mesh = record["provenance"]["devices"]["count"], record["provenance"]["mesh"]
    count = math.prod(mesh.values())  # a request is served by one device, of as many as the process has
    config = ConfigDict(_tuples(record["config"]))
    one = planned.describe(config, hardwares.devices(hardware, count), hardware.platform, hardware.capability)
    least = estimate.estimate(one, hardware, count).roofline.seconds
    watts = record["paper"]["aec_w"]
    return {
        "path": str(file.parent),
        "measured_s": record["paper"]["al_s"],
        "roofline_s": least,
        "watts": None if watts is None else watts / read,
        "pcu": record["paper"]["pcu"],
    }


def _tuples(value):
    """JSON's lists as the tuples that a config holds."""
    if isinstance(value, dict):
        return {key: _tuples(held) for key, held in value.items()}
    return tuple(_tuples(held) for held in value) if isinstance(value, list) else value
