"""Workdirs: recognition, overwriting, ownership by one process, and refused combinations."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from efficientllm.config.presets.base import get_config

from efficientllm.config.plain import plain
from efficientllm.errors import UserError
from efficientllm.record import lock, resume_check, run_files
from efficientllm.record.workdir import Workdir

pytestmark = pytest.mark.quick

HUGGING_FACE = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64}


def config(**changes):
    config_of_run = get_config()
    config_of_run.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config_of_run


def row(outcome="ok", **changes):
    return {
        "schema_version": 1,
        "outcome": outcome,
        "task": changes.get("task", "pretrain"),
        "sources": {},
        "provenance": {},
        "config": plain(config(**changes)),
    }


def claimed(path, outcome=None, steps=None, **changes):
    """A folder as a run leaves it."""
    workdir = Workdir(config(**changes), path)
    workdir.claim(config(**changes))
    if outcome:
        workdir.write_row(row(outcome, **changes))
    if steps:
        (path / "checkpoints" / str(steps)).mkdir(parents=True)
    return path


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "files",
    [
        {"config.json": json.dumps(HUGGING_FACE), "model.safetensors": "weights", "log.txt": "mine"},
        {"config.json": ""},
        {"config.json": "[]"},
        {"record.json": "3"},
        {"checkpoints/best.pt": "weights"},
        {"samples/a.wav": "sound"},
        {"run.json": "{}", "config.json": "{}"},
    ],
    ids=lambda files: next(iter(files)) + str(len(files)),
)
def test_a_folder_of_others_is_never_touched(files, overwrite, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="not a run of this program; nothing was changed") as caught:
        Workdir(config(), tmp_path, overwrite)
    assert contents(tmp_path) == before and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("proof", ["run.json", "config.json", "record.json"])
def test_any_of_a_run_s_own_files_proves_it(proof, tmp_path):
    claimed(tmp_path, "ok")
    for name in {"run.json", "config.json", "record.json"} - {proof}:
        (tmp_path / name).unlink()
    assert run_files.is_run(tmp_path)


def test_overwrite_removes_what_a_run_writes_and_nothing_else(tmp_path, capsys):
    run, elsewhere = claimed(tmp_path / "run", "ok", steps=8), tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in (
        "log.txt",
        "record.json.77.partial",
        "record.failed.json",
        "events.out.tfevents.1.host.2.0",
        "checkpoints/8/state",
        "checkpoints/unreadable-4",
        "samples/generated.jsonl",
        "adapter/adapter_config.json",
        "tokenizer/tokenizer.json",
        ".tokenizer-77/tokenizer.json",
        "notes.txt",
        "adapter/README.md",
    ):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("x")
    (elsewhere / "precious").write_text("x")
    (run / "checkpoints" / "12").symlink_to(elsewhere)
    workdir = Workdir(config(seed=1), run, overwrite=True).acquire()
    assert (run / "record.json").exists(), "nothing is removed before the new config has been checked"
    workdir.claim(config(seed=1))
    workdir.release()
    left = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert left == {"run.json", "config.json", "log.txt", "notes.txt", "adapter/README.md"}
    assert (elsewhere / "precious").exists() and not (run / "log.txt").read_text()
    assert "left in place, as no run writes them: adapter, notes.txt" in capsys.readouterr().out
    assert json.loads((run / "config.json").read_text())["seed"] == 1


def test_an_interrupted_removal_is_recognised(tmp_path, monkeypatch):
    run = claimed(tmp_path / "run", "ok", steps=8)
    workdir = Workdir(config(), run, overwrite=True)

    def dies(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_files.shutil, "rmtree", dies)
    with pytest.raises(KeyboardInterrupt):
        workdir.claim(config())
    monkeypatch.undo()
    (run / "config.json").unlink(missing_ok=True)
    assert run_files.is_run(run)
    Workdir(config(), run, overwrite=True).claim(config())
    assert not (run / "checkpoints").exists()


def test_overwrite_refuses_links_home_and_root(tmp_path, monkeypatch):
    run = claimed(tmp_path / "run", "ok")
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(UserError, match="it is a link to"):
        Workdir(config(), tmp_path / "link", overwrite=True)
    monkeypatch.setenv("HOME", str(run))
    with pytest.raises(UserError, match="home or root"):
        Workdir(config(), run, overwrite=True)
    assert (run / "record.json").exists()


@pytest.mark.parametrize("name", ["../../x", "..", ".", "", "/tmp/x", "a/../../b"])
def test_a_name_stays_below_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"config\.name = "):
        Workdir(config(name=name))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("text", ["[]", "3", "", "null", "[" * 100000, '{"outcome": "ok", "config": 3}'])
def test_a_row_that_is_none_is_no_finished_run(text, tmp_path):
    run = claimed(tmp_path / "run")
    (run / "record.json").write_text(text)
    Workdir(config(), run).answer(config())


@pytest.mark.parametrize("text", ["", "[]", "3", '{"seed": '])
def test_a_broken_config_of_a_run_is_one_line(text, tmp_path):
    run = claimed(tmp_path / "run")
    (run / "config.json").write_text(text)
    (run / "run.json").write_text('{"program": "efficientllm"}')
    with pytest.raises(UserError, match="its config.json.*or --overwrite it"):
        Workdir(config(), run).answer(config())
    Workdir(config(), run, overwrite=True).claim(config())
    assert json.loads((run / "config.json").read_text()) == plain(config())


@pytest.mark.parametrize(
    "there, asked, answer",
    [
        ({}, {}, "its row stays"),
        ({}, {"sample__tokens": 0, "checkpoint__keep": 1, "train__log_every": 3, "eval__every": 7}, "its row stays"),
        ({}, {"model__mixer": "mqa", "seed": 3}, r"another config: model.mixer \('gqa' -> 'mqa'\), seed \(0 -> 3\)"),
        ({}, {"task": "tune"}, r"task \('pretrain' -> 'tune'\)"),
        ({}, {"eval__batches": 3}, r"eval.batches \(16 -> 3\)"),
        ({}, {"mesh": "fsdp=-1"}, "mesh"),
        ({}, {"task": "plan"}, "a plan needs a folder of its own"),
        ({}, {"train__steps": 300}, None),
        ({}, {"train__steps": 100}, "config.train.steps = 100: .* holds a finished run of 200 steps"),
        ({"task": "infer"}, {"task": "infer", "infer__max_new_tokens": 7}, r"infer.max_new_tokens \(64 -> 7\)"),
        ({"task": "infer"}, {"task": "infer"}, "its row stays"),
    ],
)
def test_what_is_asked_of_a_finished_run(there, asked, answer, tmp_path):
    run = claimed(tmp_path / "run", "ok", steps=200, **there)
    workdir, new = Workdir(config(**asked), run), config(**asked)
    if answer is None:
        assert workdir.answer(new) is None
    elif answer == "its row stays":
        assert answer in workdir.answer(new)
    else:
        with pytest.raises(UserError, match=answer):
            workdir.answer(new)


@pytest.mark.parametrize(
    "asked, message",
    [
        ({}, None),
        ({"train__steps": 60, "mesh": "fsdp=-1", "eval__batches": 3, "infer__repeats": 9, "name": "b"}, None),
        ({"train__steps": 20}, "config.train.steps = 20: .* holds a checkpoint of step 40"),
        ({"seed": 1}, "holds a run with another config: seed"),
        ({"task": "infer"}, "task"),
    ],
)
def test_what_is_asked_of_an_unfinished_run(asked, message, tmp_path):
    run = claimed(tmp_path / "run", steps=40)
    if message is None:
        assert Workdir(config(**asked), run).answer(config(**asked)) is None
    else:
        with pytest.raises(UserError, match=message):
            Workdir(config(**asked), run).answer(config(**asked))


def test_a_key_that_is_newer_than_the_run_compares_with_nothing():
    assert resume_check.changed({"seed": 0}, {"seed": 0, "new": 1}, ()) == []


def test_more_steps_than_a_run_without_checkpoints_can_have(tmp_path):
    run = claimed(tmp_path / "run", "ok")
    with pytest.raises(UserError, match="no checkpoint to continue from; --overwrite starts anew"):
        Workdir(config(), run).answer(config(train__steps=300))


def test_a_row_that_is_not_ok_never_replaces_one_that_is(tmp_path):
    run = claimed(tmp_path / "run", "ok", steps=200)
    workdir = Workdir(config(), run)
    assert workdir.write_row(row("nan", train__steps=300)).name == "record.failed.json"
    assert workdir.finished()["config"]["train"]["steps"] == 200
    assert workdir.write_row(row("ok", train__steps=300)).name == "record.json"
    assert workdir.finished()["config"]["train"]["steps"] == 300 and not (run / "record.failed.json").exists()


def test_a_refused_run_leaves_no_folder(tmp_path):
    workdir = Workdir(config(), tmp_path / "a" / "run").acquire()
    (workdir.path / "log.txt").write_text("data: ...")
    workdir.release(refused=True)
    assert not workdir.path.exists()


def test_code_of_plugins_is_part_of_what_a_row_is_of(tmp_path):
    workdir = Workdir(config(), tmp_path / "run")
    workdir.code = {"mine.py": "1"}
    workdir.claim(config())
    workdir.write_row(row() | {"provenance": workdir.code_provenance()})
    later = Workdir(config(), tmp_path / "run")
    later.code = {"mine.py": "2"}
    with pytest.raises(UserError, match=r"imports \(the content of mine.py\)"):
        later.answer(config())
    (tmp_path / "run" / "record.json").unlink()
    later.claim(config())
    assert later.code_provenance() == {"code": [{"mine.py": "1"}, {"mine.py": "2"}]}


def test_a_second_owner_is_refused_until_the_first_has_left(tmp_path):
    first = lock.Lock(tmp_path).acquire()
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"process {os.getpid()} on .* is running in it"):
        lock.Lock(tmp_path).acquire()
    assert contents(tmp_path) == before
    first.release()
    assert not (tmp_path / lock.FILE).exists()
    lock.Lock(tmp_path).acquire().release()


@pytest.mark.parametrize("how", ["killed", "other boot", "reused number", "empty file", "requeued"])
def test_owners_that_have_died_are_recognised(how, tmp_path, monkeypatch):
    mine = lock.identity()
    text = {
        "other boot": {**mine, "boot": "before"},
        "reused number": {**mine, "pid": os.getppid(), "started": 1},
        "requeued": {**mine, "host": "other", "boot": "other", "job": {"SLURM_JOB_ID": "7"}},
    }.get(how)
    if how == "killed":
        code = "import os, sys; from efficientllm.record.lock import Lock; Lock(sys.argv[1]).acquire(); "
        code += "os.kill(os.getpid(), 9)"
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
        assert json.loads((tmp_path / lock.FILE).read_text())["pid"] != os.getpid()
    else:
        (tmp_path / lock.FILE).write_text(json.dumps(text) if text else "")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lock.Lock(tmp_path).acquire().release()


def test_an_owner_on_another_machine_is_refused_with_the_way_out(tmp_path):
    other = {**lock.identity(), "host": "node7", "boot": "other"}
    (tmp_path / lock.FILE).write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"on node7 .*; if that process is gone, remove .*owner\.json"):
        lock.Lock(tmp_path).acquire()
    assert json.loads((tmp_path / lock.FILE).read_text()) == other


def test_without_locks_of_the_file_system_the_file_decides(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    living = {**lock.identity(), "pid": child.pid, "started": lock.start_time(child.pid)}
    (tmp_path / lock.FILE).write_text(json.dumps(living))
    with pytest.raises(UserError, match=f"process {child.pid} "):
        lock.Lock(tmp_path).acquire()
    child.communicate(b"\n")
    lock.Lock(tmp_path).acquire().release()


def test_partial_writes_of_a_killed_run_are_removed(tmp_path):
    run = claimed(tmp_path / "run")
    for name in (".record.json-4711", "record.json.4711.partial", ".probe-4711", ".config.json-4711"):
        (run / name).touch()
    Workdir(config(), run).acquire().release()
    assert {path.name for path in run.iterdir()} == {"config.json", "run.json"}


def test_paths_that_no_system_has_are_one_line(tmp_path):
    for path in ("x" * 5000, "a\0b", str(pathlib.Path("/proc/none/run"))):
        with pytest.raises(UserError, match="cannot be written"):
            Workdir(config(), path)
