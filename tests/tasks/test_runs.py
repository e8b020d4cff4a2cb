"""Runs that are killed, stopped, damaged, finished or wrong: nothing is lost, and the numbers are the same."""

import json
import os
import random
import signal
import threading

import pytest

import runs
from efficientllm import main
from efficientllm.config.plain import flatten
from efficientllm.record import run_name
from record.test_tensorboard import hparams_table
from tiers import slow_case

pytestmark = [pytest.mark.quick, pytest.mark.xdist_group("runs")]  # they share one whole run


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return runs.corpus(tmp_path_factory.mktemp("data") / "texts")


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert main.main(runs.arguments(texts, workdir)) == 0
    return workdir


def row(workdir):
    return json.loads((workdir / "record.json").read_text())


def test_row_and_charts_of_a_whole_run(whole):
    record = row(whole)
    assert (record["schema_version"], record["outcome"], record["task"]) == (1, "ok", "pretrain")
    assert sorted(runs.losses(whole)) == list(range(1, runs.STEPS + 1))
    assert record["quality"]["eval_loss"] > 0 and record["quality"]["bits_per_byte"] > 0
    assert record["provenance"]["kernels"] == {"attention": ["xla"], "loss": ["whole"]}
    assert record["paper"]["aec_w"] is None and record["sources"]["aec_w"]["reason"]
    assert record["config"] == json.loads((whole / "config.json").read_text())


def test_the_hparams_table_holds_what_is_compared_and_every_metric_of_the_row(whole):
    columns, sessions, metrics = hparams_table(whole.parent)
    record = row(whole)
    config = flatten(record["config"])
    assert {info.name for info in columns} == set(run_name.compared_keys(config)) < set(config)
    assert "model.mixer" in run_name.compared_keys(config) and "checkpoint.every" not in run_name.compared_keys(config)
    values = sessions["run"]
    assert values["model.mixer"].string_value == "gqa" and values["train.steps"].number_value == runs.STEPS
    row_metrics = {
        f"_row/{key}" for group in ("paper", "quality") for key, value in record[group].items() if value is not None
    }
    assert {tag for tag in metrics if tag.startswith("_row/")} == row_metrics and "_row/eval_loss" in row_metrics


@pytest.mark.slow
def test_a_finished_run_is_left_alone_unless_overwritten(whole, texts, capsys):
    before = (whole / "record.json").stat().st_mtime_ns
    assert main.main(runs.arguments(texts, whole)) == 0
    assert "holds a finished run" in capsys.readouterr().out
    assert (whole / "record.json").stat().st_mtime_ns == before
    assert main.main([*runs.arguments(texts, whole), "--overwrite"]) == 0
    assert (whole / "record.json").stat().st_mtime_ns > before


@pytest.mark.slow
def test_killed_at_any_step_and_resumed_gives_the_same_losses_bit_for_bit(texts, tmp_path):
    options = {"train__steps": 30, "checkpoint__every": 5, "eval__every": 0}
    status, output = runs.finish(runs.start(runs.arguments(texts, tmp_path / "a", **options)))
    assert status == 0, output
    argv = runs.arguments(texts, tmp_path / "b", **options)
    process, at = runs.start(argv), random.randint(14, 26)
    runs.when(tmp_path / "b", f"step {at:2}/30", process.kill)
    assert runs.finish(process)[0] == -signal.SIGKILL, f"at step {at}"
    status, output = runs.finish(runs.start(argv))
    assert status == 0 and "resuming from step" in output
    assert runs.losses(tmp_path / "a") == runs.losses(tmp_path / "b")
    quality = [row(tmp_path / name)["quality"] for name in "ab"]
    assert quality[0] == quality[1]


@pytest.mark.parametrize("name", [slow_case("SIGTERM"), "SIGINT"])
def test_a_signal_saves_and_the_same_command_resumes(name, whole, texts, tmp_path, capsys):
    workdir, signum = tmp_path / "run", getattr(signal, name)
    argv = runs.arguments(texts, workdir)
    sender = threading.Thread(target=runs.when, args=(workdir, "step  3/12", lambda: os.kill(os.getpid(), signum)))
    sender.start()
    assert main.main(argv) == 128 + signum
    sender.join()
    assert "the same command resumes" in capsys.readouterr().out
    assert not (workdir / "record.json").exists()
    assert main.main(argv) == 0
    assert runs.losses(workdir) == runs.losses(whole)


def test_a_truncated_checkpoint_falls_back_to_the_one_before(whole, texts, tmp_path, capsys):
    workdir = tmp_path / "run"
    argv = runs.arguments(texts, workdir, checkpoint__keep=3)
    assert main.main(argv) == 0
    for file in (workdir / "checkpoints" / "12" / "state").rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    (workdir / "record.json").unlink()
    assert main.main(argv) == 0
    output = capsys.readouterr().out
    assert "checkpoint 12 cannot be read" in output and "resuming from step 8" in output
    assert (workdir / "checkpoints" / "unreadable-12").exists()
    assert runs.losses(workdir) == runs.losses(whole)


def test_a_changed_model_names_the_keys(whole, texts, capsys):
    argv = runs.arguments(texts, whole, train__steps=24, model__mixer="mqa", seed=3)
    (whole / "record.json").rename(whole / "kept.json")
    try:
        assert main.main(argv) == 2
    finally:
        (whole / "kept.json").rename(whole / "record.json")
    error = capsys.readouterr().err
    assert "model.mixer ('gqa' -> 'mqa'), seed (0 -> 3)" in error and "train.steps" not in error


def test_a_full_disk_is_one_clear_line_and_older_checkpoints_stay(texts, tmp_path):
    workdir = tmp_path / "run"
    argv = runs.arguments(texts, workdir)
    assert main.main([*argv, "--config.train.steps=4"]) == 0
    size = max(file.stat().st_size for file in (workdir / "checkpoints").rglob("*") if file.is_file())
    (workdir / "record.json").unlink()
    # A process of its own: orbax's threads die of the error after they have handed it on.
    status, output = runs.finish(runs.start(argv, devices=8, file_kib=size // 4096, JAX_ENABLE_COMPILATION_CACHE="0"))
    assert status == 3 and "Traceback" not in output, output
    messages = [line for line in output.splitlines() if line.startswith("cannot write a checkpoint to ")]
    assert len(messages) == 1 and messages[0].endswith("the last good checkpoint is step 4")
    assert main.main(argv) == 0


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_the_run_as_nan(texts, tmp_path, capsys):
    workdir = tmp_path / "run"
    argv = runs.arguments(texts, workdir, train__schedule="constant(peak=1e20)", checkpoint__every=1)
    assert main.main(argv) == 3
    assert row(workdir)["outcome"] == "nan"
    assert "not a number; the last good checkpoint is step" in capsys.readouterr().out


@pytest.mark.parametrize(
    "override, message",
    [
        ({"model.mixer": "gqqa"}, "config.model.mixer = 'gqqa': no mixer of that name"),
        ({"model.mixer": "gqa(num_kv_head=2)"}, "no field 'num_kv_head'"),
        ({"model.remat": "dots"}, "config.model.remat = 'dots': no such policy"),
        ({"train.batch_size": "7"}, "config.train.batch_size = 7: 7 rows a micro-batch do not divide"),
        ({"train.accumulate": "3"}, "config.train.accumulate = 3: must divide"),
        ({"train.length": "100000"}, "config.train.length = 100000"),
        ({"train.schedule": "cosin(peak=1)"}, "did you mean 'cosine'?"),
        ({"train.optimizer": "adam"}, "did you mean 'adamw'?"),
        ({"train.decay": "(('kernel', 0.1),)"}, "config.train.decay: no rule matches parameter"),
        ({"mesh": "data=3"}, "config.mesh = 'data=3': needs 3 devices; there are 8"),
        ({"mesh": "date=8"}, "did you mean 'data'?"),
        ({"task": "pretrian"}, "did you mean 'pretrain'?"),
        ({"imports": "('no_such_plugin',)"}, "config.imports = 'no_such_plugin': cannot be imported"),
        ({"data": "text(path='/nowhere/*.txt')"}, "/nowhere"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_input_is_one_line_and_status_2(override, message, texts, tmp_path, capsys):
    assert main.main(runs.arguments(texts, tmp_path / "run", **override)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_workdir_that_cannot_be_written(texts, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main.main(runs.arguments(texts, tmp_path / "file" / "run")) == 2
    assert "cannot be written" in capsys.readouterr().err
