"""Files that are damaged, or that lie: one clear line each, before a tensor is read."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from efficientllm.convert.files.safetensors_file import INDEX, SafetensorsFolder
from efficientllm.errors import UserError

pytestmark = pytest.mark.quick

F4 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


def write(folder, header, room=64, name="model.safetensors"):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + bytes(room))


@pytest.mark.parametrize(
    "header, message",
    [
        pytest.param({"a": F4 | {"data_offsets": [52, 68]}}, "ends 4 bytes behind the end", id="outside"),
        pytest.param({"a": F4, "b": F4 | {"data_offsets": [12, 28]}}, "'a' and 'b' overlap", id="overlap"),
        pytest.param({"a": F4 | {"dtype": "F128"}}, "'a' is of dtype 'F128'", id="dtype"),
        pytest.param({"a": F4 | {"shape": [5]}}, "'a' has 16 bytes; F32 of shape [5] has 20", id="size"),
        pytest.param({"a": F4 | {"shape": [-4]}}, "whole numbers", id="negative"),
        pytest.param({"a": F4 | {"shape": [2**40, 2**40]}}, "16 bytes", id="huge"),
        pytest.param({"a": F4 | {"data_offsets": [16, 0]}}, "-16 bytes", id="backwards"),
        pytest.param({"a": F4 | {"dtype": []}}, "'a' is of dtype []", id="dtype list"),
        pytest.param({"a": F4 | {"shape": {"4": 4}}}, "no dtype, shape and data_offsets", id="shape object"),
        pytest.param({"a": F4 | {"shape": [1] * 2000 + [4]}}, "no dtype, shape and data_offsets", id="axes"),
        pytest.param({"a": F4 | {"shape": [True, 4]}}, "whole numbers", id="bool"),
        pytest.param({"a": F4 | {"shape": [10**39, 0]}}, "whole numbers", id="digits"),
        pytest.param({"a": F4 | {"data_offsets": [0, 16, 32]}}, "no dtype, shape and data_offsets", id="offsets"),
        pytest.param({"a": []}, "no dtype, shape and data_offsets", id="entry"),
        pytest.param(b'{"a": {"shape": [' + b"9" * 5000 + b"]}}", "a number of 5000 digits", id="5000 digits"),
        pytest.param({"a": {"dtype": "F32"}}, "no dtype, shape and data_offsets", id="fields"),
        pytest.param([1, 2], "cannot be read", id="list"),
        pytest.param(b'{"a": ', "cannot be read", id="broken"),
        pytest.param(b'{"a": 1, "a": 2}', "twice", id="twice"),
        pytest.param(b"[" * 100_000, "cannot be read", id="deep"),
    ],
)
def test_header(tmp_path, header, message):
    write(tmp_path, header)
    with pytest.raises(UserError) as error:
        SafetensorsFolder(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"1234", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 100) + b"{}"])
def test_no_header(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="cut short"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "a\\b", 3])
def test_index_stays_in_its_folder(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    write(tmp_path, {"a": F4})
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="leads out of the folder"):
        SafetensorsFolder(folder)


@pytest.mark.parametrize(
    "index, message",
    [
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors is missing"),
        ({"weight_map": {"b": "part.safetensors"}}, "'b' is not in it"),
        ({"weights": {}}, "no index of tensors"),
        ({"weight_map": []}, "no index of tensors"),
        ([], "an object is needed"),
    ],
)
def test_index(tmp_path, index, message):
    write(tmp_path, {"a": F4}, name="part.safetensors")
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        SafetensorsFolder(tmp_path)


def test_pickles_are_never_loaded(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(UserError, match=r"pytorch_model.bin is a pickle.*save_pretrained"):
        SafetensorsFolder(tmp_path)


def test_what_the_library_writes_is_read(tmp_path):
    rng = np.random.default_rng(0)
    kinds = [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.int64]
    written = {np.dtype(kind).name: rng.normal(0, 20, (5, 3)).astype(kind) for kind in kinds} | {"e": np.zeros((0, 3))}
    save_file(written, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tensors = SafetensorsFolder(tmp_path)
    assert tensors.shapes == {name: value.shape for name, value in written.items()}
    for name, value in written.items():
        assert tensors.read(name).dtype == value.dtype == tensors.dtype(name)
        np.testing.assert_array_equal(tensors.read(name), value)
