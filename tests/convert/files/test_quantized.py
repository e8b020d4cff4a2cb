"""Foreign quantized checkpoints: block-wise float8, GPTQ and AWQ against their dequantized weights."""

import json
import struct

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import folders
from efficientllm import convert, model
from efficientllm.errors import UserError
from efficientllm.ops.attention import Context
from efficientllm.quant.int4 import Int4
from tiers import slow_case, slow_except

SHAPE = {"hidden_size": 64, "intermediate_size": 96}
GROUP = 32
BLOCK = (24, 40)  # of float8


def write_raw(file, tensors):
    """A safetensors file with dtypes that the package's numpy side does not know."""
    names = {"float8_e4m3fn": "F8_E4M3", "float32": "F32"}
    header, at = {}, 0
    for name, value in tensors.items():
        header[name] = {"dtype": names[value.dtype.name], "shape": value.shape, "data_offsets": [at, at + value.nbytes]}
        at += value.nbytes
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(value.tobytes() for value in tensors.values()))


def is_linear(name):
    return "_proj" in name


def float8(folder, plain):
    """The model of `plain` in blocks that do not divide it, and the weights that they stand for."""
    stored, exact = {}, {}
    for name, value in plain.items():
        if not is_linear(name):
            stored[name] = exact[name] = value
            continue
        N, K = value.shape
        scale = np.zeros((-(-N // BLOCK[0]), -(-K // BLOCK[1])), np.float32)
        rounded, back = np.zeros((N, K), ml_dtypes.float8_e4m3fn), np.zeros((N, K), np.float32)
        for i, j in np.ndindex(scale.shape):
            rows, columns = (slice(at * size, (at + 1) * size) for at, size in zip((i, j), BLOCK, strict=True))
            block = rows, columns
            scale[i, j] = np.abs(value[block]).max() / 448
            rounded[block] = value[block] / scale[i, j]
            back[block] = rounded[block].astype(np.float32) * scale[i, j]
        stored[name], stored[f"{name}_scale_inv"], exact[name] = rounded, scale, back
    write_raw(folder / "model.safetensors", stored)
    return exact, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)}


def packed(kind):
    """AutoGPTQ's or AutoAWQ's words, code by code, of random codes."""

    def words(x_KN, along, order):
        x = x_KN if along else x_KN.T
        out = np.zeros((x.shape[0], x.shape[1] // 8), np.uint32)
        for i, column in enumerate(order):
            out |= x[:, column::8].astype(np.uint32) << np.uint32(4 * i)
        return (out if along else out.T).copy().view(np.int32)

    def write(folder, plain):
        rng = np.random.default_rng(1)
        stored, exact = {}, {}
        for name, value in plain.items():
            if not is_linear(name):
                stored[name] = exact[name] = value
                continue
            N, K = value.shape
            codes, zeros = rng.integers(0, 16, (K, N)), rng.integers(1, 16, (K // GROUP, N))
            scales = (rng.random((K // GROUP, N)) / 40).astype(np.float16)
            inner = name.removesuffix("weight")
            order = range(8) if kind == "gptq" else (0, 2, 4, 6, 1, 3, 5, 7)
            stored[f"{inner}qweight"] = words(codes, kind == "awq", order)
            stored[f"{inner}qzeros"] = words(zeros - (kind == "gptq"), True, order)
            stored[f"{inner}scales"] = scales
            whole = (codes - zeros.repeat(GROUP, 0)) * scales.astype(np.float32).repeat(GROUP, 0)
            exact[name] = whole.T.astype(np.float32).copy()
        save_file(stored, folder / "model.safetensors")
        return exact, {"quant_method": kind, "bits": 4, "group_size": GROUP}

    return write


def gptq(folder, plain, zero=None, stored_as=-1, order=None, group=GROUP, bias=None):
    """AutoGPTQ's files of one zero, of groups that need not divide the inputs, in an order, with biases."""
    rng, words = np.random.default_rng(1), packed_words
    stored, exact = {}, {}
    for name, value in plain.items():
        if not is_linear(name):
            stored[name] = exact[name] = value
            continue
        (N, K), G = value.shape, -(-value.shape[1] // group)
        codes = rng.integers(0, 16, (K, N))
        zeros = rng.integers(1, 16, (G, N)) if zero is None else np.full((G, N), zero)
        scales = (rng.random((G, N)) / 40).astype(np.float16)
        groups = (order or np.arange)(K) // group
        inner = name.removesuffix("weight")
        stored[f"{inner}qweight"] = words(codes, False)
        stored[f"{inner}qzeros"] = words(zeros + stored_as, True)
        stored[f"{inner}scales"] = scales
        stored |= {f"{inner}g_idx": groups.astype(np.int32)} if order else {}
        stored |= {f"{inner}bias": np.full(N, bias, np.float16)} if bias is not None else {}
        exact[name] = ((codes - zeros[groups]) * scales.astype(np.float32)[groups]).T.astype(np.float32).copy()
    save_file(stored, folder / "model.safetensors")
    return exact


def packed_words(x_KN, along):
    """Eight codes a word, of neighbours along the outputs or the inputs."""
    x = x_KN if along else x_KN.T
    out = sum(x[:, i::8].astype(np.uint32) << np.uint32(4 * i) for i in range(8))
    return (out if along else out.T).copy().view(np.int32)


def shuffled(K):
    return np.random.default_rng(2).permutation(K)


GPTQ = {
    "symmetric": ({"zero": 8}, {"sym": True}),
    "zeros as they are": ({"zero": 8, "stored_as": 0}, {"sym": True}),
    "zeros as they are, in no words": ({"zero": 8, "stored_as": 0}, {}),
    "version 2": ({"stored_as": 0}, {"checkpoint_format": "gptq_v2", "sym": False}),
    "version 2 named 1": ({"zero": 8, "stored_as": 0}, {"checkpoint_format": "gptq", "sym": True}),
    "asymmetric nines": ({"zero": 9}, {"sym": False}),
    "groups that do not divide": ({"group": 40, "zero": 8}, {"sym": True, "group_size": 40}),
    "one group": ({"group": 96, "zero": 8}, {"sym": True, "group_size": -1}),
    "ordered by activation": ({"order": shuffled}, {"desc_act": True}),
    "an order that is none": ({"order": np.arange, "group": 40}, {"desc_act": False, "group_size": 40}),
    "zero biases": ({"bias": 0.0}, {}),
}


@pytest.mark.parametrize("case", GPTQ)
def test_gptq_of_every_kind(case, tmp_path):
    """Read as float32, and where groups are runs of inputs, kept as they are."""
    config, keys = GPTQ[case]
    exact = gptq(tmp_path, folders.llama(tmp_path, **SHAPE), **config)
    keys = {"quant_method": "gptq", "bits": 4, "group_size": GROUP} | keys
    (tmp_path / "config.json").write_text(json.dumps(folders.LLAMA | SHAPE | {"quantization_config": keys}))
    source, lm, abstract = loaded(tmp_path, scan=False)
    params = source.load(abstract, lm=lm)
    kernels = [("mlp.up_proj", "ffn", "up"), ("mlp.down_proj", "ffn", "down"), ("self_attn.q_proj", "mixer", "q")]
    for disk, kernel_name, ours in kernels:
        expected = exact[f"model.layers.1.{disk}.weight"].T
        np.testing.assert_array_equal(params["group_1"]["block_0"][kernel_name][ours]["kernel"], expected)
    if case == "ordered by activation":
        with pytest.raises(UserError, match="desc_act"):
            source.load_stored(abstract, lm)
        return
    stored = source.load_stored(abstract, lm)
    for disk, kernel_name, ours in kernels:
        expected = exact[f"model.layers.1.{disk}.weight"].T
        np.testing.assert_array_equal(stored["group_1"]["block_0"][kernel_name][ours]["kernel"].dense(), expected)


@pytest.mark.parametrize(
    "config, keys, message",
    [
        ({"bias": 1.0}, {}, "proj.bias' belongs to nothing"),
        ({}, {"sym": True}, "sym is true, but its zeros are not all 8"),
        ({}, {"group_size": 24}, "do not fit each other"),
        ({}, {"group_size": "32"}, "group_size must be"),
        ({}, {"desc_act": True}, "g_idx, the group of each input, is missing"),
        ({"zero": 8}, {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    ],
)
def test_gptq_that_says_two_things_is_refused(config, keys, message, tmp_path):
    gptq(tmp_path, folders.llama(tmp_path, **SHAPE), **config)
    keys = {"quant_method": "gptq", "bits": 4, "group_size": GROUP} | keys
    (tmp_path / "config.json").write_text(json.dumps(folders.LLAMA | SHAPE | {"quantization_config": keys}))
    with pytest.raises(UserError, match=message) as error:
        source, lm, abstract = loaded(tmp_path)
        source.load(abstract, lm=lm)
    assert "\n" not in str(error.value)


WRITERS = {"fp8": float8, "gptq": packed("gptq"), "awq": packed("awq")}


@pytest.fixture(params=slow_except(WRITERS, "gptq"))
def both(request, tmp_path):
    """`(kind, folder that is rounded, folder of the exact weights)`."""
    rounded, plain = tmp_path / "rounded", tmp_path / "plain"
    tensors = folders.llama(rounded, **SHAPE)
    exact, config = WRITERS[request.param](rounded, tensors)
    (rounded / "config.json").write_text(json.dumps(folders.LLAMA | SHAPE | {"quantization_config": config}))
    folders.llama(plain, lambda tensors: tensors.update(exact), **SHAPE)
    return request.param, rounded, plain


def loaded(folder, scan=True):
    source = convert.open_source(folder)
    lm = source.lm(scan=scan)
    return source, lm, nn.unbox(model.abstract_params(lm))


def test_it_reads_as_the_weights_it_stands_for(both):
    _, rounded, plain = both
    (ours, _, abstract), (theirs, _, _) = loaded(rounded), loaded(plain)
    jax.tree.map(np.testing.assert_array_equal, ours.load(abstract), theirs.load(abstract))


def test_stored_kernels_are_kept_and_multiply(both):
    kind, rounded, plain = both
    source, lm, abstract = loaded(rounded, scan=False)
    if kind == "fp8":
        with pytest.raises(UserError, match="holds no weights quantized"):
            source.load_stored(abstract, lm)
        return
    stored, exact = source.load_stored(abstract, lm), loaded(plain)[0].load(abstract)
    kernel = stored["group_1"]["block_0"]["mixer"]["q"]["kernel"]
    assert isinstance(kernel, Int4) and kernel.values.nbytes == 64 * 64 // 2
    np.testing.assert_array_equal(kernel.dense(), exact["group_1"]["block_0"]["mixer"]["q"]["kernel"])
    ids = np.arange(24, dtype=np.int32)[None]
    logits = [lm.apply({"params": params}, ids, Context.packed(ids))[0] for params in (stored, exact)]
    np.testing.assert_allclose(*logits, atol=1e-3)


@pytest.mark.parametrize(
    "kind, change, message",
    [
        slow_case("fp8", {"weight_block_size": None}, "weight_block_size must be two numbers"),
        ("gptq", {"bits": 8}, "bits must be 4"),
        slow_case("awq", {"version": "gemv"}, "only gemm's layout"),
        ("gptq", {"quant_method": "aqlm"}, "known are quant_method fp8"),
    ],
)
def test_other_roundings_are_refused_by_name(kind, change, message, tmp_path):
    _, config = WRITERS[kind](tmp_path, folders.llama(tmp_path, **SHAPE))
    folder = folders.LLAMA | SHAPE | {"quantization_config": config | change}
    (tmp_path / "config.json").write_text(json.dumps(folder))
    with pytest.raises(UserError, match=message) as error:
        convert.open_source(tmp_path)
    assert "quantization_config" in str(error.value) and "\n" not in str(error.value)


PARTS = [
    *[("scales", np.ones(shape, np.float16)) for shape in [(1, 1), (2, 0), (64,)]],
    *[("qzeros", np.ones(shape, np.int32)) for shape in [(1, 8), (8, 2), (16,), (0,)]],
    *[("qweight", np.ones(shape, np.int32)) for shape in [(8,), (0, 64), (8, 8, 8)]],
    ("qweight", np.ones((8, 64), np.float32)),
    ("qzeros", np.ones((2, 8), np.int64)),
    *[("scales", np.full((2, 64), value, np.float16)) for value in (np.inf, np.nan)],
]
INDICES = [
    *[("g_idx", np.full(64, value, np.int32)) for value in (-1, 2, 10**9)],
    *[("g_idx", np.zeros(shape, np.int32)) for shape in [(3,), (64, 2), (0,)]],
]


@pytest.mark.parametrize(
    "kind, tensor, value",
    [*(("gptq", *tensor) for tensor in PARTS + INDICES), *(slow_case("awq", *tensor) for tensor in PARTS)],
    ids=lambda value: (
        f"{value.dtype}{list(value.shape)}{value.flat[0] if value.size else ''}" if hasattr(value, "dtype") else value
    ),
)
def test_parts_that_do_not_fit_are_refused(kind, tensor, value, tmp_path):
    _, config = WRITERS[kind](tmp_path, folders.llama(tmp_path, **SHAPE))
    (tmp_path / "config.json").write_text(json.dumps(folders.LLAMA | SHAPE | {"quantization_config": config}))
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {f"model.layers.0.self_attn.q_proj.{tensor}": value}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="q_proj") as error:
        source, lm, abstract = loaded(tmp_path)
        source.load(abstract)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("block", [[0, 4], [4], [4, -4], [1.5, 4], ["4", 4], [True, 4], [10**18, 4], 4, {"a": 1}])
def test_blocks_that_are_none_are_refused(block, tmp_path):
    _, config = WRITERS["fp8"](tmp_path, folders.llama(tmp_path, **SHAPE))
    folder = folders.LLAMA | SHAPE | {"quantization_config": config | {"weight_block_size": block}}
    (tmp_path / "config.json").write_text(json.dumps(folder))
    with pytest.raises(UserError, match="weight_block_size must be two numbers"):
        convert.open_source(tmp_path)


def test_blocks_larger_than_a_weight_take_no_memory_of_their_size(tmp_path):
    tensors = folders.llama(tmp_path, **SHAPE)
    stored = {}
    for name, value in tensors.items():
        stored[name] = value.astype(ml_dtypes.float8_e4m3fn) if is_linear(name) else value
        if is_linear(name):
            stored[f"{name}_scale_inv"] = np.ones((1, 1), np.float32)
    write_raw(tmp_path / "model.safetensors", stored)
    config = {"quant_method": "fp8", "weight_block_size": [60_000, 60_000]}
    (tmp_path / "config.json").write_text(json.dumps(folders.LLAMA | SHAPE | {"quantization_config": config}))
    source, _, _ = loaded(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_array_equal(source.tensors.read(name), stored[name].astype(np.float32))


@pytest.mark.parametrize(
    "kind, broken, message",
    [
        slow_case("fp8", "_scale_inv", "q_proj.weight_scale_inv' is missing"),
        ("gptq", "qzeros", "q_proj.qzeros' is missing"),
    ],
)
def test_a_missing_part_is_named(kind, broken, message, tmp_path, monkeypatch):
    from efficientllm.convert.files.safetensors_file import SafetensorsFolder

    _, config = WRITERS[kind](tmp_path, folders.llama(tmp_path, **SHAPE))
    (tmp_path / "config.json").write_text(json.dumps(folders.LLAMA | SHAPE | {"quantization_config": config}))
    opened = SafetensorsFolder.__init__

    def without(self, folder):
        opened(self, folder)
        self.shapes = {
            name: shape for name, shape in self.shapes.items() if not name.endswith(f"q_proj.weight{broken}")
        }
        self.shapes = {name: shape for name, shape in self.shapes.items() if not name.endswith(f"q_proj.{broken}")}

    monkeypatch.setattr(SafetensorsFolder, "__init__", without)
    with pytest.raises(UserError, match=message):
        source, lm, abstract = loaded(tmp_path)
        source.load(abstract)
