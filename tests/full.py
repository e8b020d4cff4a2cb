"""The full tier, in parts: `python tests/full.py`. The same command goes on after an interruption.

A part is a folder's files of tests, or one of the files beside this one, which have the longest tests.

Results are kept in `full_results.json`, which is committed, so that another machine can go on: each part's with its
date, commit and processor. A run ends when every part has a result since it began; then the table in CONTRIBUTING.md is
written. A part that failed is run again by its path.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Iterable
from importlib.metadata import version

from efficientllm.runtime.atomic_write import write_atomically

ROOT = pathlib.Path(__file__).parents[1]
GUIDE = ROOT / "CONTRIBUTING.md"
RESULTS = ROOT / "tests" / "full_results.json"
COLUMNS = "Date | Commit | Python | JAX | CPU | Passed | Failed | Skipped | Minutes"
TABLE = re.compile(rf"^\| {re.escape(COLUMNS)} \|\n\|[-|]+\|\n(?:\|.*\|\n)*", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Result:
    """Counts of one part of the tests, the seconds that it took, when and where."""

    date: str
    commit: str
    python: str
    jax: str
    cpu: str
    seconds: float
    passed: int
    failed: int
    skipped: int
    failures: list[str]


def git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True).stdout.strip()


def cache_folder() -> pathlib.Path:
    cache = os.environ.get("EFFICIENTLLM_CACHE") or "~/.cache/efficientllm"
    return pathlib.Path(cache).expanduser() / "tests"


def test_parts(paths: list[str]) -> dict[str, list[str]]:
    """The tracked files of tests under `paths`, `{part: its files}`."""
    parts: dict[str, list[str]] = {}
    for file in map(pathlib.PurePosixPath, git("ls-files", *paths).splitlines()):
        if file.match("test_*.py"):
            parts.setdefault(str(file if file.parent.name == "tests" else file.parent), []).append(str(file))
    return parts


def new_result(seconds: float, passed: int, skipped: int, failures: list[str]) -> Result:
    """Makes the result of a part that has just run."""
    from efficientllm.record import provenance

    cpu, commit = provenance.processor(), git("rev-parse", "--short=10", "HEAD")
    when = datetime.datetime.now().isoformat(timespec="seconds")
    where = platform.python_version(), version("jax"), f"{cpu['cores']} × {cpu['name']}"
    return Result(when, commit, *where, round(seconds, 1), passed, len(failures), skipped, failures)


def read_report(path: pathlib.Path, part: str, status: int, seconds: float) -> Result:
    """Counts of a JUnit report; an exit status that is none of a test's counts as one failure."""
    (suite,) = xml.etree.ElementTree.parse(path).getroot().iter("testsuite")
    total, skipped = int(suite.get("tests")), int(suite.get("skipped"))
    broken = [
        case for case in suite.iter("testcase") if case.find("failure") is not None or case.find("error") is not None
    ]
    failures = [f"{case.get('classname')}: {case.get('name')}" for case in broken]
    if status not in (0, 1, 5):  # 5: no test in the part
        failures.append(f"{part}: pytest ended with {status}")
    return new_result(seconds, total - skipped - len(broken), skipped, failures)


def run_part(part: str, files: list[str], workers: str, report: pathlib.Path) -> Result:
    """Runs all tests of a part, the slow ones too."""
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "", "-n", workers, "--no-header", f"--junitxml={report}", *files]
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        status = process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        raise
    seconds = time.monotonic() - began
    if not report.exists():
        return new_result(seconds, 0, 0, [f"{part}: pytest ended with {status} and no report"])
    return read_report(report, part, status, seconds)


class Progress:
    """The results of the parts; those since the run began, under this Python and JAX, need not be run again."""

    def __init__(self, file: pathlib.Path):
        stored = json.loads(file.read_text()) if file.exists() else {"done": [], "parts": {}}
        self.file, self.done = file, stored["done"]
        self.results = {part: Result(**fields) for part, fields in stored["parts"].items()}

    def due(self, parts: Iterable[str]) -> list[str]:
        """Lists the parts without a result of this run."""
        return [part for part in parts if part not in self.done or not self._is_here(part)]

    def _is_here(self, part):
        result = self.results.get(part)
        return result is not None and (result.python, result.jax) == (platform.python_version(), version("jax"))

    def add(self, part: str, result: Result) -> None:
        self.results[part], self.done = result, sorted({*self.done, part})
        parts = {name: dataclasses.asdict(self.results[name]) for name in sorted(self.results)}
        write_atomically(self.file, json.dumps({"done": self.done, "parts": parts}, indent=1) + "\n")

    def seconds_left(self, parts: Iterable[str]) -> float | None:
        """An estimate for the parts that are due: unknown ones take the mean of the known; None if none is."""
        measured = [result.seconds for result in self.results.values()]
        mean = sum(measured) / len(measured) if measured else None
        left = [self.results[part].seconds if part in self.results else mean for part in self.due(parts)]
        return None if None in left else sum(left)


def clock_time(seconds: float | None) -> str:
    return "?" if seconds is None else str(datetime.timedelta(seconds=round(seconds)))


def table_row(results: list[Result]) -> str:
    """The row of COLUMNS for the results of all parts: the first and the last date and commit, the sums of counts."""

    def of_all(key):
        ordered = sorted(results, key=lambda result: result.date)
        return list(dict.fromkeys(getattr(result, key) for result in ordered))

    def ends(values):
        return values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}"

    counts = [sum(getattr(result, key) for result in results) for key in ("passed", "failed", "skipped")]
    minutes = round(sum(result.seconds for result in results) / 60)
    where = ["; ".join(of_all(key)) for key in ("python", "jax", "cpu")]
    days = list(dict.fromkeys(date[:10] for date in of_all("date")))
    return f"| {' | '.join(map(str, [ends(days), ends(of_all('commit')), *where, *counts, minutes]))} |"


def write_table(guide: pathlib.Path, row: str) -> None:
    """Replaces the rows of the table in `guide`."""
    text = guide.read_text()
    if len(TABLE.findall(text)) != 1:
        raise SystemExit(f"{guide.name} needs one table of the columns {COLUMNS}")
    rule = "---|" * len(COLUMNS.split("|"))
    write_atomically(guide, TABLE.sub(lambda _: f"| {COLUMNS} |\n|{rule}\n{row}\n", text))


def run_parts(parts: dict[str, list[str]], workers: str, progress: Progress) -> None:
    """Runs the parts that are due; prints counts and an estimate of the time left after each."""
    due = progress.due(parts)
    for index, part in enumerate(parts, 1):
        if part not in due:
            continue
        print(f"[{index}/{len(parts)}] {part}", flush=True)
        report = cache_folder() / "report.xml"
        report.parent.mkdir(parents=True, exist_ok=True)
        progress.add(part, run_part(part, parts[part], workers, report))
        result, left = progress.results[part], clock_time(progress.seconds_left(parts))
        counts = f"{result.passed} passed, {result.failed} failed, {result.skipped} skipped"
        print(f"[{index}/{len(parts)}] {counts}; {result.seconds:.0f} s, {left} left", flush=True)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/full.py", description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", default=["tests"], help="parts to run again")
    parser.add_argument("-n", default="auto", dest="workers", help="pytest-xdist's workers")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    if git("status", "--porcelain", "--", ".", f":!{GUIDE.name}", f":!{RESULTS.relative_to(ROOT)}"):
        print("uncommitted changes: commit them; results are kept with their commit", file=sys.stderr)
        return 2
    everything, parts = test_parts(["tests"]), test_parts(arguments.paths)
    if broken := [part for part, files in parts.items() if files != everything[part]]:
        print(f"{broken[0]}: run whole parts: a folder, or a file beside this one", file=sys.stderr)
        return 2
    progress = Progress(RESULTS)
    if arguments.paths != ["tests"] or not progress.due(everything):  # chosen parts; or the run before has ended
        progress.done = [part for part in progress.done if part not in parts]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run_parts(parts, arguments.workers, progress)
    except KeyboardInterrupt:
        print("stopped: the same command goes on with the part that it was at")
        return 130
    results = [progress.results[part] for part in parts]
    failures = [failure for result in results for failure in result.failures]
    print(*failures, f"{len(failures)} failed of {sum(result.passed for result in results) + len(failures)}", sep="\n")
    if not progress.due(everything):
        write_table(GUIDE, table_row([progress.results[part] for part in everything]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
