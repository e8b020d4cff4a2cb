"""Checkpoints of ours with rounded weights: written, of the bytes claimed, read back bit for bit; damaged ones."""

import json
import pathlib

import flax.linen as nn
import jax
import numpy as np
import pytest

from efficientllm import convert, model
from efficientllm.convert import rounding
from efficientllm.convert.__main__ import main
from efficientllm.errors import UserError
from efficientllm.quant.rows import resident_bytes
from efficientllm.quant.tree import quantize

from . import folders

SHAPE = {"hidden_size": 64, "intermediate_size": 96}
FORMS = ["bfloat16", "int8", "int4(symmetric=False)", "nf4"]


def loaded(folder, scan=False):
    source = convert.open_source(folder)
    lm = source.lm(scan=scan)
    return source, lm, nn.unbox(model.abstract_params(lm))


@pytest.mark.parametrize("form", FORMS)
def test_written_and_read(form, tmp_path):
    folders.llama(tmp_path / "plain", **SHAPE)
    source, lm, abstract = loaded(tmp_path / "plain")
    exact = quantize(source.load(abstract), form)
    assert main([str(tmp_path / "plain"), f"--quant={form}", f"--out={tmp_path / 'rounded'}"]) == 0
    again, lm, abstract = loaded(tmp_path / "rounded")
    stored = again.load_stored(abstract, lm)
    assert jax.tree.structure(stored) == jax.tree.structure(exact)
    jax.tree.map(np.testing.assert_array_equal, stored, exact)
    # The file holds the bits claimed: its header apart, what the weights take in memory.
    file = tmp_path / "rounded" / "model.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - 8 - header == resident_bytes(exact)
    # Read as what it stands for, of layers apart and stacked.
    dense = jax.tree.map(lambda leaf: leaf.dense() if hasattr(leaf, "dense") else leaf, exact, is_leaf=_is_rounded)
    jax.tree.map(np.testing.assert_array_equal, again.load(abstract), dense)
    _, stacked, shapes = loaded(tmp_path / "rounded", scan=True)
    jax.tree.map(np.testing.assert_array_equal, model.unroll(stacked, again.load(shapes))[1], dense)


def _is_rounded(leaf):
    return hasattr(leaf, "dense")


def test_several_files_and_calibrated(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 40, (4, 16), np.int32)
    folders.llama(tmp_path / "plain", **SHAPE)
    source = convert.open_source(tmp_path / "plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding.calibrate, "text", lambda *_: tokens)
        patch.setattr(type(source), "tokenizer", lambda self: "bytes")
        rounding.convert(source, "int4(method='awq')", tmp_path / "rounded", shard=10_000)
    assert len(list((tmp_path / "rounded").glob("*.safetensors"))) > 2
    again, lm, abstract = loaded(tmp_path / "rounded")
    kernel = again.load_stored(abstract, lm)["group_0"]["block_0"]["mixer"]["q"]["kernel"]
    assert kernel.x_scale is not None and kernel.shape == (64, 64)


def spoil(folder, change):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda c: c["quantization_config"].update(leaves=3), "no leaf of ours"),
        (lambda c: c["quantization_config"]["leaves"]["embedding"].update(leaf="os.system"), "no leaf of ours"),
        (lambda c: c["quantization_config"]["leaves"]["embedding"].update(further=1), "'embedding' is no Int8"),
        (lambda c: c["quantization_config"]["leaves"].pop("embedding"), "'embedding' is missing"),
        (lambda c: c.update(num_hidden_layers=3), "'group_2/block_0"),
        (lambda c: c.update(num_hidden_layers=1), "'group_1/block_0.* belongs to nothing"),
        (lambda c: c.update(intermediate_size=64), r"of shape \[96, 64\], the config asks for \[64, 64\]"),
    ],
)
def test_what_does_not_fit_is_named(change, said, tmp_path):
    folders.llama(tmp_path / "plain", **SHAPE)
    rounding.convert(convert.open_source(tmp_path / "plain"), "int4", tmp_path / "rounded")
    spoil(tmp_path / "rounded", change)
    with pytest.raises(UserError, match=said):
        source = convert.open_source(tmp_path / "rounded")
        source.bind(source.lm(scan=False))


@pytest.mark.parametrize("flags", [["--quant=float32"], ["--quant=int4", "--dtype=float32"], ["--data=bytes"]])
def test_bad_flags_are_one_line(flags, tmp_path, capsys):
    folders.llama(tmp_path / "plain", **SHAPE)
    assert main([str(tmp_path / "plain"), f"--out={tmp_path / 'new'}", *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not pathlib.Path(tmp_path / "new").exists()
