"""Failures in or after a run: the row, the line that names the place, and the exit status."""

import contextlib
import json
import math
import os
import subprocess
import sys

import pytest

import runs
from efficientllm import main
from efficientllm.evaluation import held_out
from efficientllm.objectives.base import exact_sum
from efficientllm.objectives.next_token import NEXT_TOKEN
from efficientllm.record import lock
from efficientllm.record.row import read_record, write_record
from efficientllm.registry import plugins
from efficientllm.train import fingerprints, loop
from tiers import slow_case

pytestmark = pytest.mark.xdist_group("runs")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return runs.corpus(tmp_path_factory.mktemp("data") / "texts")


def row(workdir, name="record.json"):
    return json.loads((workdir / name).read_text())


def run(texts, workdir, *flags, **overrides):
    values = {"train__steps": 4, "eval__every": 0, "checkpoint__every": 2, "sample__tokens": 1, **overrides}
    return main.main([*runs.arguments(texts, workdir, **values), *flags])


MIXER = """
import flax.linen as nn
from efficientllm.mixers.attention import GQA
from efficientllm.registry import register

@register("mixer", "{name}")
class Broken(GQA):
    @nn.compact
    def __call__(self, x_BTD, ctx, state=None):
        {line}
        return super().__call__(x_BTD, ctx, state)
"""


@pytest.mark.parametrize(
    "line, kind", [("y = 1 / 0", "ZeroDivisionError: division by zero"), ("y = x_BTD @ x_BTD", "TypeError: ")]
)
def test_a_technique_s_exception_is_a_row_and_one_line_with_its_place(line, kind, texts, tmp_path, capsys):
    name = f"broken{len(line)}"
    mine = tmp_path / "mine.py"
    mine.write_text(MIXER.format(name=name, line=line))
    status = run(texts, tmp_path / "run", model__mixer=f"{name}(num_heads=2)", imports=f"('{mine}',)")
    error = capsys.readouterr().err.strip()
    assert status == 3 and error.count("\n") == 0, error
    assert kind in error and f"{mine}:10, in __call__" in error
    record = row(tmp_path / "run")
    assert record["outcome"] == "error" and record["error"] in error and record["provenance"]["code"]
    assert "Traceback" in (tmp_path / "run" / "log.txt").read_text()


def test_a_plugin_that_cannot_be_imported_is_bad_input(texts, tmp_path, capsys):
    mine = tmp_path / "mine.py"
    mine.write_text("x = 1\ny = x / 0\n")
    assert run(texts, tmp_path / "run", imports=f"('{mine}',)") == 2
    error = capsys.readouterr().err
    assert "ZeroDivisionError: division by zero" in error and f"{mine}:2" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_place_is_of_the_user_s_code_else_of_ours():
    def raised(function):
        try:
            function()
        except Exception as error:
            return error

    assert "test_failures.py" in plugins.error_location(raised(lambda: json.loads("{")))
    assert "efficientllm/" in plugins.error_location(raised(lambda: read_record(3.5)))
    assert plugins.error_location(ValueError("never raised")) == "no traceback"


@pytest.mark.parametrize("what", ["exports.write_adapter", "samples.complete_text", "exports.keep_checkpoints"])
def test_what_is_optional_fails_after_the_row_and_takes_nothing_away(what, texts, tmp_path, monkeypatch, capsys):
    def fails(*_):
        assert row(tmp_path / "run")["outcome"] == "ok"
        raise ZeroDivisionError("optional")

    monkeypatch.setattr(f"efficientllm.tasks.{what}", fails)
    assert run(texts, tmp_path / "run") == 0
    assert "ZeroDivisionError: optional (" in capsys.readouterr().out
    assert row(tmp_path / "run")["outcome"] == "ok"


def test_costs_that_cannot_be_computed_are_null_with_the_reason(texts, tmp_path, monkeypatch, capsys):
    from efficientllm.train import row as train_row

    def fails(*_):
        raise AttributeError("no mix_flops")

    monkeypatch.setattr(train_row, "_utilisation", fails)
    monkeypatch.setattr(train_row, "readings", fails)
    assert run(texts, tmp_path / "run") == 0
    record = row(tmp_path / "run")
    assert record["outcome"] == "ok" and record["quality"]["eval_loss"] > 0 and record["paper"]["al_s"] is None
    assert "could not be computed: AttributeError: no mix_flops (" in record["sources"]["al_s"]["reason"]
    assert capsys.readouterr().out.count("no FLOPs are counted") == 1


@pytest.mark.parametrize("value", [math.nan, slow_case(math.inf)])
def test_a_held_out_loss_that_is_no_number_is_an_outcome(value, texts, tmp_path, monkeypatch, capsys):
    real, calls = held_out.evaluate, []

    def broken(*arguments):
        calls.append(1)
        losses = real(*arguments)
        return losses | {"eval_loss": value, "perplexity": value, "bits_per_byte": value} if len(calls) == 2 else losses

    monkeypatch.setattr(held_out, "evaluate", broken)
    workdir = tmp_path / "run"
    assert run(texts, workdir, eval__every=2) == 3
    record = row(workdir)
    assert record["outcome"] == "nan" and record["quality"]["eval_loss"] is None
    assert record["sources"]["eval_loss"]["reason"] == f"not finite: {value}"
    assert f"held-out loss {value} at step 4: not a number; the last good checkpoint is step 2" in record["error"]
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2"]
    assert run(texts, workdir, eval__every=2) == 0  # a fault that does not come again
    assert "resuming from step 2" in capsys.readouterr().out and row(workdir)["outcome"] == "ok"


@pytest.mark.slow
def test_a_checkpoint_whose_next_loss_is_no_number_is_not_the_last_good_one(texts, tmp_path, monkeypatch, capsys):
    collect, seen = loop._Loop.collect, []

    def broken(self, *arguments, **named):
        if self.pending and self.pending[0] == 3 and not seen:
            seen.append(1)
            self.pending = (3, {**self.pending[1], "loss": math.nan})
        return collect(self, *arguments, **named)

    monkeypatch.setattr(loop._Loop, "collect", broken)
    workdir = tmp_path / "run"
    assert run(texts, workdir, checkpoint__every=1) == 3
    assert "the last good checkpoint is step 1" in row(workdir)["error"]
    assert (workdir / "checkpoints" / "diverged-2").is_dir()
    assert run(texts, workdir, checkpoint__every=1) == 0
    assert "resuming from step 1" in capsys.readouterr().out


@pytest.mark.slow
def test_more_steps_go_on_and_the_old_row_stays_until_the_new_one(texts, tmp_path, capsys, monkeypatch):
    workdir = tmp_path / "run"
    assert run(texts, workdir) == 0
    with monkeypatch.context() as patch:
        patch.setattr(held_out, "evaluate", lambda *_: {"eval_loss": math.nan, "perplexity": math.nan})
        assert run(texts, workdir, train__steps=6) == 3
    assert row(workdir)["outcome"] == "ok" and row(workdir)["config"]["train"]["steps"] == 4
    assert row(workdir, "record.failed.json")["outcome"] == "nan"
    assert run(texts, workdir, train__steps=6) == 0
    record = row(workdir)
    assert record["config"]["train"]["steps"] == 6 and not (workdir / "record.failed.json").exists()
    assert record["provenance"]["schedules"] == [{"from_step": 0, "steps": 4}, {"from_step": 4, "steps": 6}]
    assert "the learning rate is that of 4 steps up to step 4, of 6 steps from there on" in capsys.readouterr().out
    assert run(texts, workdir, train__steps=6) == 0
    assert run(texts, workdir, train__steps=4) == 2
    assert "config.train.steps = 4: " in capsys.readouterr().err
    assert row(workdir) == record


def test_a_corpus_that_has_changed_is_refused(tmp_path, capsys):
    texts = runs.corpus(tmp_path / "texts")
    workdir = tmp_path / "run"
    assert run(texts, workdir, tokenizer="bpe(vocab_size=300)") == 0
    (texts / "00.txt").write_text("other words than before")
    assert run(texts, workdir, tokenizer="bpe(vocab_size=300)", train__steps=6) == 2
    error = capsys.readouterr().err
    assert f"config.data = \"text(path='{texts}/*.txt')\": its content is not what the run" in error
    assert row(workdir)["config"]["train"]["steps"] == 4
    assert fingerprints.of_weights(texts / "00.txt")


def test_a_finished_run_may_keep_no_checkpoint(texts, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert run(texts, workdir, checkpoint__keep=0) == 0
    assert not [path for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal()]
    assert "removed, " in capsys.readouterr().out
    assert run(texts, workdir, checkpoint__keep=0, train__steps=6) == 2
    assert "--overwrite starts anew" in capsys.readouterr().err


def test_a_second_process_is_one_line_and_touches_nothing(texts, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert run(texts, workdir) == 0
    (workdir / "record.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    code = "import sys; from efficientllm.record.lock import Lock; Lock(sys.argv[1]).acquire(); print('in'); "
    code += "sys.stdout.flush(); input()"
    argv, pipe = [sys.executable, "-c", code, str(workdir)], subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True) as first:
        assert first.stdout.readline() == "in\n"
        capsys.readouterr()
        try:
            assert run(texts, workdir) == run(texts, workdir, "--overwrite") == 2
        finally:
            output = capsys.readouterr()
            first.kill()
    assert output.err.count(f"process {first.pid} on ") == output.err.count("\n") == 2 and not output.out
    after = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.name != lock.FILE}
    assert {path: at for path, at in before.items() if path.is_file()}.items() <= after.items()
    assert run(texts, workdir) == 0  # the killed one's lock is stale


def test_numbers_that_are_not_finite_are_null_with_the_reason(tmp_path):
    text = {"a": {"b": [1.0, math.inf]}, "c": math.nan, "d": 2.5}
    write_record(text, tmp_path / "record.json")
    written = json.loads((tmp_path / "record.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert written == {"a": {"b": [1.0, None]}, "c": None, "d": 2.5, "not_finite": {"a.b[1]": "inf", "c": "nan"}}


@pytest.mark.parametrize("nats", [math.nan, math.inf, -math.inf])
def test_sums_of_what_is_not_finite_do_not_raise(nats, monkeypatch):
    monkeypatch.setattr(held_out, "to_device", lambda batch, shardings: batch)
    sums = [(nats, 2.0, 3.0), (1.0, 2.0, 3.0)]
    losses = held_out.evaluate(NEXT_TOKEN, lambda params, batch, table: batch, None, sums, None, {})
    assert not math.isfinite(losses["eval_loss"])
    assert NEXT_TOKEN.readings(losses)["eval_loss"].reason == f"not finite: {nats}"
    assert "eval_loss" in held_out.line(losses)


def test_infinities_that_cancel_do_not_raise():
    assert math.isnan(exact_sum([math.inf, -math.inf]))


def test_a_full_disk_s_log_is_no_traceback(tmp_path, capfd):
    from efficientllm.runtime.log import close_log, open_log

    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    (tmp_path / "log.txt").symlink_to("/dev/full")
    log = open_log(tmp_path / "log.txt")
    log.info("a line")
    with contextlib.suppress(OSError):
        close_log()
    captured = capfd.readouterr()
    assert captured.out == "a line\n" and not captured.err
