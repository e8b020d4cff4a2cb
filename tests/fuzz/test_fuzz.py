"""Spoiled files are read or refused in one line: no traceback, no endless wait, no memory without bound.

The default run gives each reader a second or two; --fuzz-seconds=S gives it S, and the slow test half an hour to all.
A failure names its reader, seed and input, which `python -m fuzz.run --readers=... --seed=...` makes again.
"""

import os

import pytest

from fuzz import readers, run

SECONDS, SLOW_SECONDS = 1.0, 1800 / len(readers.READERS)
NEEDED = {"gguf": "gguf"}  # packages


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFICIENTLLM_CACHE", str(tmp_path / "cache"))


def fuzz(name, seconds, folder, seed):
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    tried = 0
    for outcome in run.outcomes(name, seed, folder, seconds=seconds):
        tried += 1
        if isinstance(outcome, run.Outcome):
            pytest.fail(f"{outcome.kind} after {tried} inputs: {outcome.text}", pytrace=False)
    assert tried >= 5


@pytest.mark.parametrize("name", readers.READERS)
def test_spoiled_files_are_read_or_refused(name, request, tmp_path):
    asked = request.config.getoption("--fuzz-seconds", None) or os.environ.get("EFFICIENTLLM_FUZZ_SECONDS")
    fuzz(name, float(asked or SECONDS), tmp_path / name, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", readers.READERS)
def test_half_an_hour_of_spoiled_files(name, tmp_path):
    fuzz(name, SLOW_SECONDS, tmp_path / name, seed=1)


def test_a_reader_with_a_fault_is_found(monkeypatch, tmp_path):
    """A traceback, several lines, a wait and memory are each told apart; a line is none of them."""
    faults = [ValueError("x"), readers.EXPECTED("one line"), None, "wait", "memory"]

    def read(folder):
        fault = faults[len(kinds)]
        if fault == "wait":
            while True:
                pass
        if fault == "memory":
            bytearray(4 * run.MEMORY)
        if isinstance(fault, Exception):
            raise fault

    monkeypatch.setattr(run, "HUNG_S", 0.5)
    plain = readers.READERS["text"]
    monkeypatch.setitem(readers.READERS, "faulty", readers.Reader(plain.make, plain.spoil, read))
    kinds = []
    for outcome in run.outcomes("faulty", 0, tmp_path, inputs=len(faults)):
        kinds.append(outcome.kind if isinstance(outcome, run.Outcome) else outcome)
    assert kinds == ["ValueError", False, True, "hang", "MemoryError"]
