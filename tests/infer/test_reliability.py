"""What is left of a run that is stopped, beyond memory or given half a file; and stops that never come."""

import json
import signal

import pytest

from efficientllm import main
from efficientllm.infer.engine import Engine
from efficientllm.infer.streaming import Stream
from infer.test_inference import arguments, base  # noqa: F401 a fixture

pytestmark = pytest.mark.xdist_group("inference")
NEW = 24
NEVER = {"infer__stop": "('nowhere to be found',)", "infer__max_new_tokens": NEW, "infer__batch_size": 1}


@pytest.mark.slow
@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143)])
def test_stopped_in_mid_answer(name, status, base, tmp_path, monkeypatch, capsys):  # noqa: F811
    """The first answer, whose stop never came, is whole; of the second there is what there was."""
    decode, calls = Engine.decode, []

    def interrupted(engine, carry, prompts, steps):
        calls.append(steps)
        if sum(calls) > NEW + 8:
            signal.raise_signal(signal.Signals[name])
        return decode(engine, carry, prompts, steps)

    monkeypatch.setattr(Engine, "decode", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main.main(arguments(base, tmp_path / "run", **NEVER)) == status
    finally:
        signal.signal(signal.SIGINT, before)
    first, second = map(json.loads, (tmp_path / "run" / "samples" / "generated.jsonl").read_text().splitlines())
    assert first["complete"] and first["tokens"] == NEW and first["answer"]
    assert not second["complete"] and 0 < second["tokens"] < NEW and second["answer"]
    captured = capsys.readouterr()
    assert f"\n{name}: what was generated is in" in captured.out + captured.err
    assert not (tmp_path / "run" / "record.json").exists()  # the same command runs it


@pytest.mark.slow
def test_a_batch_beyond_memory_is_a_row_of_its_own_kind(base, tmp_path, capsys):  # noqa: F811
    wide = {
        "model__pretrained": "",
        "model__size": "tiny(num_layers=1, dim=32, num_heads=64, num_kv_heads=64, head_dim=128)",
    }
    beyond = wide | {"infer__batch_size": 2**20, "infer__prompt_length": 100, "memory_gb": 10**6}
    assert main.main(arguments(base, tmp_path / "run", **beyond)) == 3
    assert json.loads((tmp_path / "run" / "record.json").read_text())["outcome"] == "oom"
    captured = capsys.readouterr()
    lines = [line for line in (captured.out + captured.err).splitlines() if "memory" in line]
    assert len(lines) == 1 and "out of device memory" in lines[0], lines


def test_half_a_file_is_one_line(base, tmp_path, capsys):  # noqa: F811
    model = tmp_path / "model"
    model.mkdir()
    for file in (base / "model").iterdir():
        content = file.read_bytes()
        (model / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    for source, named in ((model, "model.safetensors: tensor"), (model / "half.gguf", "half.gguf: ")):
        if source.suffix:
            source.write_bytes(b"GGUF" + bytes(200))
        assert main.main(arguments(base, tmp_path / "run", model__pretrained=source)) == 2
        error = capsys.readouterr().err
        assert named in error and error.count("\n") == 1, error
    assert not (tmp_path / "run" / "record.json").exists()


def test_what_may_become_a_stop_is_shown_once_it_did_not():
    shown = []
    stream = Stream(shown.append, ("STOP", "END"))
    for text in ("a ST", "a STO", "a STONE E"):
        stream.show(text)
    assert shown == ["a ", "STONE "]
    stream.show("a STONE E", finished=True)
    assert "".join(shown) == "a STONE E"
