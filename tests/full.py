"""The full tier, in parts: `python tests/full.py`. The same command goes on after an interruption.

A part is a folder's files of tests, or one of the files beside this one, which have the longest tests.

Results are kept in the cache folder by commit, Python and JAX; at the end the table in CONTRIBUTING.md is written.
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
COLUMNS = "Date | Commit | Python | JAX | CPU | Passed | Failed | Skipped | Minutes"
TABLE = re.compile(rf"^\| {re.escape(COLUMNS)} \|\n\|[-|]+\|\n(?:\|.*\|\n)*", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Result:
    """Counts of one part of the tests, and the seconds that it took."""

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
    return Result(seconds, total - skipped - len(broken), len(failures), skipped, failures)


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
        return Result(seconds, 0, 1, 0, [f"{part}: pytest ended with {status} and no report"])
    return read_report(report, part, status, seconds)


class Progress:
    """The results of a commit, and how long each part took the last time, whatever the commit."""

    def __init__(self, commit: str):
        self.results_file = cache_folder() / f"{commit}-python{platform.python_version()}-jax{version('jax')}.json"
        self.seconds_file = cache_folder() / "seconds.json"
        self.results = {part: Result(**fields) for part, fields in self._read(self.results_file).items()}
        self.seconds = self._read(self.seconds_file)

    def add(self, part: str, result: Result) -> None:
        self.results[part], self.seconds[part] = result, result.seconds
        self._write(self.results_file, {name: dataclasses.asdict(result) for name, result in self.results.items()})
        self._write(self.seconds_file, self.seconds)

    def seconds_left(self, parts: Iterable[str]) -> float | None:
        """An estimate for the parts without a result: unknown ones take the mean of the known; None if none is."""
        measured = self.seconds.values()
        mean = sum(measured) / len(measured) if measured else None
        left = [self.seconds.get(part, mean) for part in parts if part not in self.results]
        return None if None in left else sum(left)

    @staticmethod
    def _read(path: pathlib.Path) -> dict:
        return json.loads(path.read_text()) if path.exists() else {}

    @staticmethod
    def _write(path: pathlib.Path, values: dict) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(values))


def clock_time(seconds: float | None) -> str:
    return "?" if seconds is None else str(datetime.timedelta(seconds=round(seconds)))


def table_row(commit: str, results: list[Result]) -> str:
    """The row of COLUMNS for the results of all parts."""
    from efficientllm.record import provenance

    cpu = provenance.processor()
    counts = [sum(getattr(result, key) for result in results) for key in ("passed", "failed", "skipped")]
    minutes = sum(result.seconds for result in results) / 60
    where = [platform.python_version(), version("jax"), f"{cpu['cores']} × {cpu['name']}"]
    return f"| {' | '.join(map(str, [datetime.date.today(), commit[:10], *where, *counts, round(minutes)]))} |"


def write_table(guide: pathlib.Path, row: str) -> None:
    """Replaces the rows of the table in `guide`."""
    text = guide.read_text()
    if len(TABLE.findall(text)) != 1:
        raise SystemExit(f"{guide.name} needs one table of the columns {COLUMNS}")
    rule = "---|" * len(COLUMNS.split("|"))
    write_atomically(guide, TABLE.sub(lambda _: f"| {COLUMNS} |\n|{rule}\n{row}\n", text))


def run_parts(parts: dict[str, list[str]], workers: str, progress: Progress) -> None:
    """Runs the parts without a result; prints counts and an estimate of the time left after each."""
    for index, (part, files) in enumerate(parts.items(), 1):
        if part in progress.results:
            continue
        print(f"[{index}/{len(parts)}] {part}", flush=True)
        progress.add(part, run_part(part, files, workers, cache_folder() / "report.xml"))
        result, left = progress.results[part], clock_time(progress.seconds_left(parts))
        counts = f"{result.passed} passed, {result.failed} failed, {result.skipped} skipped"
        print(f"[{index}/{len(parts)}] {counts}; {result.seconds:.0f} s, {left} left", flush=True)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/full.py", description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", default=["tests"], help="some of the tests; no table is written then")
    parser.add_argument("-n", default="auto", dest="workers", help="pytest-xdist's workers")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    if git("status", "--porcelain", "--", ".", f":!{GUIDE.name}"):
        print("uncommitted changes: commit them; results are kept by commit", file=sys.stderr)
        return 2
    commit, parts = git("rev-parse", "HEAD"), test_parts(arguments.paths)
    progress = Progress(commit)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run_parts(parts, arguments.workers, progress)
    except KeyboardInterrupt:
        print("stopped: the same command goes on with the part that it was at")
        return 130
    results = [progress.results[part] for part in parts]
    failures = [failure for result in results for failure in result.failures]
    print(*failures, f"{len(failures)} failed of {sum(result.passed for result in results) + len(failures)}", sep="\n")
    if arguments.paths == ["tests"]:
        write_table(GUIDE, table_row(commit, results))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
