"""The command line: a folder converted, and the exit statuses."""

import sys

import numpy as np
import pytest

from convert import folders
from efficientllm import convert
from efficientllm.convert import __main__ as command
from efficientllm.convert import check


def test_folder_to_folder(tmp_path, capsys):
    folders.llama(tmp_path / "in")
    assert command.main([str(tmp_path / "in"), f"--out={tmp_path / 'out'}", "--dtype=bfloat16"]) == 0
    assert "llama, bfloat16" in capsys.readouterr().out
    assert convert.open_source(tmp_path / "out").stored_dtype == "bfloat16"


def test_an_adapter_merged(tmp_path, capsys):
    tensors = folders.llama(tmp_path / "in")
    module = "model.layers.1.self_attn.v_proj"
    added = folders.adapter(tmp_path / "adapter", {f"{module}.weight": tensors[f"{module}.weight"].shape}, rank=2)
    argv = [str(tmp_path / "in"), f"--out={tmp_path / 'out'}", f"--merge={tmp_path / 'adapter'}"]
    assert command.main(argv) == 0
    merged_tensors = convert.open_source(tmp_path / "out").tensors
    a, b = (added[f"base_model.model.{module}.lora_{factor}.weight"] for factor in "AB")
    for name, value in tensors.items():
        expected = value + 2 * b @ a if name.startswith(module) else value
        np.testing.assert_allclose(merged_tensors.read(name), expected, rtol=1e-5, atol=1e-5)
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 3, "lora_alpha": 4}')
    assert command.main([*argv[:1], f"--out={tmp_path / 'not'}", argv[2]]) == 2
    assert "another model or rank" in capsys.readouterr().err and not (tmp_path / "not").exists()


def test_check(tmp_path, capsys):
    pytest.importorskip("torch")
    folders.llama(tmp_path / "in")
    assert command.main(["check", str(tmp_path / "in")]) == 0
    printed = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (
        float(printed["max logit difference"]) < 1e-4 * float(printed["max logit"]) and float(printed["tokens"]) == 64
    )


def test_check_finds_what_is_more_than_rounding(tmp_path, capsys, monkeypatch):
    pytest.importorskip("torch")
    folders.llama(tmp_path / "in")
    ours = check._ours
    monkeypatch.setattr(check, "_ours", lambda *arguments: 1.01 * ours(*arguments))
    assert command.main(["check", str(tmp_path / "in")]) == 1
    assert "max logit difference" in capsys.readouterr().out


def test_check_without_torch(tmp_path, capsys, monkeypatch):
    folders.llama(tmp_path / "in")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert command.main(["check", str(tmp_path / "in")]) == 2
    assert "pip install" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, message",
    [
        (["gone/x/y", "--out=z"], "no such file"),
        (["x"], "--out"),
        (["x", "--ouy=1", "--out=z"], "--ouy"),
        (["gone", "--out=z", "--quant=int5"], "--quant = 'int5': no quant of that name"),
        (["gone", "--out=z", "--quant=int8(group=-1)"], "group = -1: must be at least 0"),
        (["gone", "--out=z", "--quant=int8", "--data=txt(path='x')"], "did you mean 'text'?"),
        (["gone", "--out=z", "--quant=int8", "--dtype=float16"], "--quant goes with neither"),
        (["gone", f"--out={'z' * 300}"], "--out = "),
        (["gone", "--out="], "--out is empty"),
    ],
)
def test_bad_input(argv, message, capsys):
    assert command.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_help_imports_no_jax(capsys):
    assert command.main(["--help"]) == 0 and "SOURCE" in capsys.readouterr().out
    assert command.main([]) == 2
    import subprocess

    program = "import efficientllm.convert.__main__ as c, sys; c.main(['--help']); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
