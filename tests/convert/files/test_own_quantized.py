"""Our quantized checkpoints: written at the claimed size, read back bit for bit, and refused when damaged."""

import json
import pathlib

import flax.linen as nn
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import folders
from efficientllm import convert, data, model
from efficientllm.convert import write_quantized
from efficientllm.convert.__main__ import main
from efficientllm.errors import UserError
from efficientllm.quant.apply import quantize
from efficientllm.weights import resident_bytes
from tiers import slow_except

SHAPE = {"hidden_size": 64, "intermediate_size": 96}
FORMS = ["bfloat16", "int8", "int4(symmetric=False)", "nf4"]


def loaded(folder, scan=False):
    source = convert.open_source(folder)
    lm = source.lm(scan=scan)
    return source, lm, nn.unbox(model.abstract_params(lm))


@pytest.mark.slow
@pytest.mark.parametrize("form", slow_except(FORMS, *FORMS[:3]))
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


@pytest.mark.slow
def test_several_files_and_calibrated(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 40, (4, 16), np.int32)
    folders.llama(tmp_path / "plain", **SHAPE)
    source = convert.open_source(tmp_path / "plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "calibration_rows", lambda *_: tokens)
        patch.setattr(type(source), "tokenizer", lambda self: "bytes")
        write_quantized.convert_quantized(source, "int4(method='awq')", tmp_path / "rounded", shard=10_000)
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
    "change, message",
    [
        (lambda c: c["quantization_config"].update(leaves=3), "not a leaf class"),
        (lambda c: c["quantization_config"]["leaves"]["embedding"].update(leaf="os.system"), "not a leaf class"),
        (lambda c: c["quantization_config"]["leaves"]["embedding"].update(further=1), "'embedding' is no Int8"),
        (lambda c: c["quantization_config"]["leaves"].pop("embedding"), "'embedding' is missing"),
        (lambda c: c["quantization_config"]["leaves"].update({"": {"leaf": "Int4", "columns": 64}}), "'' is no Int4"),
        (lambda c: c.update(num_hidden_layers=3), "'group_2/block_0"),
        (lambda c: c.update(num_hidden_layers=1), "'group_1/block_0.* belongs to nothing"),
        (lambda c: c.update(intermediate_size=64), r"of shape \[96, 64\], the config asks for \[64, 64\]"),
    ],
)
def test_what_does_not_fit_is_named(change, message, tmp_path):
    folders.llama(tmp_path / "plain", **SHAPE)
    write_quantized.convert_quantized(convert.open_source(tmp_path / "plain"), "int4", tmp_path / "rounded")
    spoil(tmp_path / "rounded", change)
    with pytest.raises(UserError, match=message):
        source = convert.open_source(tmp_path / "rounded")
        source.bind(source.lm(scan=False))


Q = "group_0/block_0/mixer/q/kernel"  # [64, 64]: int4 and nf4 have 32 bytes a row
UNFIT = [
    *[
        ("int4", {"scale": np.ones(shape, np.float16)})
        for shape in [(1, 2), (64, 0), (64, 3), (64, 64), (128,), (2, 64, 2)]
    ],
    ("int4", {"scale": np.ones((64, 2), np.float32)}),
    ("int4", {"values": np.ones((64, 16), np.uint8)}),
    ("int4", {"values": np.ones((64, 32), np.int8)}),
    ("int4", {"values": np.ones((0, 32), np.uint8)}),
    ("int4", {"minimum": np.ones((1, 1), np.float16)}),
    ("int4", {"zero": np.ones((1, 1), np.uint8)}),
    ("int4", {"zero": np.ones((64, 2), np.float16)}),
    ("int4", {"zero": np.ones((64, 2), np.uint8), "minimum": np.ones((64, 2), np.float16)}),
    ("int4", {"x_scale": np.ones((1, 63), np.float16)}),
    ("int4", {"further": np.ones((64, 2), np.float16)}),
    ("int8", {"scale": np.ones((1, 1), np.float32)}),
    ("int8", {"scale": np.ones((64, 0), np.float32)}),
    ("int8", {"values": np.ones((48, 8), np.int8)}),
    ("nf4", {"scale": np.ones((1, 1), np.float32)}),
    ("nf4", {"scale": np.ones((64, 1), np.int32)}),
    ("bfloat16", {"values": np.ones((64, 64), np.float32)}),
    ("bfloat16", {"values": np.ones(64 * 64, np.float16)}),
    *[
        (form, {"columns": value})
        for form in ("int8", "int4", "nf4")
        for value in (0, -1, 63.0, 65, 10**12, True, "64")
    ],
    ("int4", {"x_bits": 3}),
    ("int4", {"is_table": "yes"}),
    ("int8", {"values": 3}),
]


def rounded(tmp_path, form, **arrays):
    """A checkpoint in a form, of whose kernel Q arrays and fields are replaced."""
    folders.llama(tmp_path / "plain", **SHAPE)
    write_quantized.convert_quantized(convert.open_source(tmp_path / "plain"), form, tmp_path / "rounded")
    tensors = load_file(tmp_path / "rounded" / "model.safetensors")
    tensors |= {f"{Q}.{name}": value for name, value in arrays.items() if isinstance(value, np.ndarray)}
    save_file(tensors, tmp_path / "rounded" / "model.safetensors")
    fields = {name: value for name, value in arrays.items() if not isinstance(value, np.ndarray)}
    spoil(tmp_path / "rounded", lambda c: c["quantization_config"]["leaves"][Q].update(fields))
    return tmp_path / "rounded"


@pytest.mark.parametrize("form, arrays", UNFIT, ids=str)
def test_arrays_that_do_not_fit_each_other_are_refused_when_they_are_opened(form, arrays, tmp_path):
    """The native products read as many bytes as the shapes say."""
    with pytest.raises(UserError, match=f"'{Q}' is no ") as error:
        convert.open_source(rounded(tmp_path, form, **arrays))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("form, name, dtype", [("int4", "scale", np.float16), ("int8", "scale", np.float32)])
def test_scales_that_are_no_numbers_are_refused(form, name, dtype, value, tmp_path):
    shape = (64, 2) if form == "int4" else (64, 1)
    source, lm, abstract = loaded(rounded(tmp_path, form, **{name: np.full(shape, value, dtype)}))
    for load in (lambda: source.load_stored(abstract, lm), lambda: source.load(abstract)):
        with pytest.raises(UserError, match=f"'{Q}': scale holds NaN or infinity"):
            load()


def test_a_tensor_of_no_leaf_is_refused(tmp_path):
    folder = rounded(tmp_path, "int4")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"os.path": np.zeros((2, 2), np.float32)}, folder / "model.safetensors")
    source, lm, _ = loaded(folder)
    with pytest.raises(UserError, match="'os.path' is of 'os', which quantization_config.leaves lacks"):
        source.bind(lm)


@pytest.mark.parametrize("flags", [["--quant=float32"], ["--quant=int4", "--dtype=float32"], ["--data=bytes"]])
def test_bad_flags_are_one_line(flags, tmp_path, capsys):
    folders.llama(tmp_path / "plain", **SHAPE)
    assert main([str(tmp_path / "plain"), f"--out={tmp_path / 'new'}", *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not pathlib.Path(tmp_path / "new").exists()
