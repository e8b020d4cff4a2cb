"""Weights beyond the range of the written dtype: refused by tensor name, never written as inf or NaN."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import folders
from efficientllm.convert.__main__ import main
from efficientllm.quant import apply

pytestmark = pytest.mark.quick

NAME = "model.layers.1.mlp.up_proj.weight"


def folder(path, value):
    """A Llama with one weight of its own."""
    folders.llama(path, lambda tensors: tensors[NAME].__setitem__((3, 5), value))
    return str(path)


@pytest.mark.parametrize("value, dtype", [(1e5, "float16"), (-7e4, "float16"), (3.4e38, "bfloat16")])
def test_a_weight_beyond_the_dtype(tmp_path, value, dtype, capsys):
    source = folder(tmp_path / "in", value)
    assert main([source, f"--out={tmp_path / 'out'}", f"--dtype={dtype}"]) == 2
    printed = capsys.readouterr().err
    assert NAME in printed and dtype in printed and printed.count("\n") == 1 and not (tmp_path / "out").exists()


def test_what_it_can_hold_is_written(tmp_path):
    source = folder(tmp_path / "in", 1e5)
    assert main([source, f"--out={tmp_path / 'out'}", "--dtype=bfloat16"]) == 0
    assert float(load_file(tmp_path / "out" / "model.safetensors")[NAME][3, 5]) == pytest.approx(1e5, rel=0.01)


def test_a_copy_is_a_copy(tmp_path):
    """inf and NaN too."""
    source = folder(tmp_path / "in", np.nan)
    assert main([source, f"--out={tmp_path / 'out'}"]) == 0
    copied, first = (load_file(tmp_path / name / "model.safetensors")[NAME] for name in ("out", "in"))
    np.testing.assert_array_equal(copied, first)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e6])
@pytest.mark.parametrize("form", ["int4()", "int8()", "nf4()", "float16", "bfloat16", "int4(symmetric=False)"])
def test_rounding_them(tmp_path, value, form, capsys):
    source = folder(tmp_path / "in", value)
    holds = value == 1e6 and form in ("int8()", "bfloat16", "nf4()")
    assert main([source, f"--out={tmp_path / 'out'}", f"--quant={form}"]) == (0 if holds else 2)
    if not holds:
        printed = capsys.readouterr().err
        assert "ffn/up/kernel" in printed and form in printed and printed.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_in_a_whole_tree():
    params = {"block_0": {"mixer": {"q": {"kernel": np.full((32, 32), np.inf, np.float32)}}}}
    with pytest.raises(apply.UserError, match="block_0/mixer/q/kernel"):
        apply.quantize(params, "int8()")
