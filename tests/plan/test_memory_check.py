"""Memory compared with what there is, before it is taken: one line that says what would fit, and a key to go on."""

import re

import pytest

import runs
from convert import folders
from efficientllm import main
from efficientllm.convert import __main__ as convert
from efficientllm.cost import available_memory
from efficientllm.metrics import host

pytestmark = pytest.mark.quick

SMALL = {"train__steps": 2, "eval__every": 0, "sample__tokens": 0}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return runs.corpus(tmp_path_factory.mktemp("data") / "texts")


@pytest.fixture
def free(monkeypatch):
    """Sets what the machine, or its container, has free."""
    return lambda size: monkeypatch.setattr(host, "memory_free_bytes", lambda: int(size))


def run(texts, workdir, **overrides):
    return main.main(runs.arguments(texts, workdir, **{**SMALL, **overrides}))


def test_a_state_that_cannot_fit_is_refused_before_it_is_compiled(texts, tmp_path, free, monkeypatch, capsys):
    free(24e9)
    monkeypatch.setattr("efficientllm.train.setup.compile_steps", lambda *_: pytest.fail("compiled"))
    assert run(texts, tmp_path / "run", model__size="3b") == 2  # on each of eight devices of one memory
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "config.model.size = '3b' needs 395." in error and "24.0 GB" in error
    assert re.search(r"with --config\.model\.size=small it would need \d+\.\d GB; to go on regardless", error)
    assert "--config.memory_gb=399" in error and not (tmp_path / "run").exists()


def test_a_step_that_cannot_fit_is_refused_before_its_state_is_made(texts, tmp_path, free, monkeypatch, capsys):
    free(3e6)
    monkeypatch.setattr("efficientllm.train.setup.create_state", lambda *_: pytest.fail("made"))
    assert run(texts, tmp_path / "run", train__batch_size=256) == 2
    error = capsys.readouterr().err
    assert "by the compiler's plan of a step" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_key_goes_on_regardless_and_lowers_it_too(texts, tmp_path, free, capsys):
    free(1)
    assert run(texts, tmp_path / "run", memory_gb=50) == 0
    free(1e12)
    assert run(texts, tmp_path / "b", memory_gb=0.0001) == 2
    assert "config.memory_gb: 0.0 GB" in capsys.readouterr().err


def test_serving_is_refused_with_the_form_that_would_fit(texts, tmp_path, free, capsys):
    free(12e9)
    argv = runs.arguments(
        texts, tmp_path / "run", "configs/infer.py", model__pretrained="", model__size="7b", infer__chat=False
    )
    assert main.main(argv) == 2
    error = capsys.readouterr().err
    assert "config.model.size = '7b' needs " in error and "--config.quant='int8()'" in error, error
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_what_is_said_of_the_future_has_slack_and_what_is_certain_has_none():
    room = available_memory.AvailableMemory(100, True, "here")
    assert not room.refuses(100, 120) and room.refuses(101, 101) and room.refuses(0, 121)


@pytest.mark.parametrize("flags", [[], ["--quant=int8()"]])
def test_a_conversion_that_no_memory_here_can_hold_is_refused(flags, tmp_path, monkeypatch, capsys):
    folders.llama(tmp_path / "model", vocab_size=300)
    argv = [str(tmp_path / "model"), f"--out={tmp_path / 'out'}", *flags]
    with monkeypatch.context() as patch:
        patch.setattr(host, "memory_total_bytes", lambda: 1000)
        assert convert.main(argv) == 2
    error = capsys.readouterr().err
    assert "GB at once; there is memory of 0.0 GB" in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
