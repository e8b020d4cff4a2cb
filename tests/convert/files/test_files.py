"""Which files and tensors of a folder are a model's, where transformers passes others over."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import folders, peers
from convert.peers import transformers
from efficientllm import convert
from efficientllm.architecture import from_config
from efficientllm.convert.hf_config import families, rope_parameters, to_hf
from efficientllm.convert.hf_config.canonical import canonical, differences
from efficientllm.errors import UserError

HEAD = "lm_head.weight"


def logits(folder):
    source = convert.open_source(folder)
    lm = source.lm()
    return peers.our_logits(lm, source.load(peers.abstract(lm)), peers.tokens() % 40)


def their_logits(folder):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return peers.their_logits(loaded.eval(), peers.tokens() % 40)


def indexed(folder, tensors, file="model-00001-of-00001.safetensors"):
    save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def stale_index(folder, tensors):
    """An index of other weights beside model.safetensors, which transformers takes."""
    indexed(folder, {name: np.zeros_like(value) for name, value in tensors.items()})


def stale_shard(folder, tensors):
    """A shard of another time that no index names."""
    (folder / "model.safetensors").unlink()
    indexed(folder, tensors)
    save_file({HEAD: np.zeros_like(tensors[HEAD])}, folder / "model-00002-of-00002.safetensors")


def others(folder, tensors):
    """Files of other programs, an adapter's, a pickle, and a subfolder."""
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "model.fp16.safetensors"):
        save_file({"x": np.zeros(3, np.float32)}, folder / name)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    (folder / "original").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "original" / "model.safetensors")


def half_of_it(folder, tensors):
    """Some tensors in other dtypes."""
    stored = {name: value.astype(np.float16 if "mlp" in name else np.float64) for name, value in tensors.items()}
    save_file(stored, folder / "model.safetensors")
    tensors |= {name: value.astype(np.float32) for name, value in stored.items()}


@pytest.mark.parametrize("change", [stale_index, stale_shard, others, half_of_it])
def test_the_files_that_transformers_takes(tmp_path, change):
    tensors = folders.llama(tmp_path)
    change(tmp_path, tensors)
    our_logits = logits(tmp_path)
    if change is half_of_it:
        source = convert.open_source(tmp_path)
        up = source.load(peers.abstract(source.lm()))["groups"]["block_0"]["ffn"]["up"]["kernel"]
        np.testing.assert_array_equal(up[1], tensors["model.layers.1.mlp.up_proj.weight"].T)
        return
    peers.close(our_logits, their_logits(tmp_path), 1e-4)


def test_weights_saved_without_a_head(tmp_path):
    """As embedding models and AutoModel have them: no prefix; the head is the embedding."""
    tensors = folders.llama(tmp_path, tie_word_embeddings=True, architectures=["LlamaModel"])
    bare = {name.removeprefix("model."): value for name, value in tensors.items() if name != HEAD}
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    peers.close(logits(tmp_path), their_logits(tmp_path), 1e-4)
    source = convert.open_source(tmp_path)
    convert.convert(source, tmp_path / "out")
    assert "model.norm.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_a_head_that_is_in_no_file_is_missed_by_name(tmp_path):
    tensors = folders.llama(tmp_path, architectures=["LlamaModel"])
    bare = {name.removeprefix("model."): value for name, value in tensors.items() if name != HEAD}
    save_file(bare, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"'{HEAD}' of shape"):
        logits(tmp_path)


@pytest.mark.parametrize("name", ["consolidated.safetensors", "adapter_model.safetensors"])
def test_a_folder_without_a_model_names_what_is_there(tmp_path, name):
    tensors = folders.llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    save_file(tensors, tmp_path / name)
    with pytest.raises(UserError, match=f"no .*safetensors in it but {name}"):
        convert.open_source(tmp_path)


def test_layers_behind_the_last_predict_further_tokens(tmp_path):
    theirs = peers.reference("deepseek-v3")
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    extra = {name.replace("layers.1.", "layers.2."): value for name, value in tensors.items() if "layers.1." in name}
    save_file(tensors | extra | {"model.layers.2.eh_proj.weight": np.zeros((48, 96), np.float32)}, file)
    source = convert.open_source(tmp_path)
    lm = source.lm()
    our_logits = peers.our_logits(lm, source.load(peers.abstract(lm)), peers.tokens())
    peers.close(our_logits, peers.their_logits(theirs, peers.tokens()), 1e-5)


def test_code_that_is_not_copied_is_not_named(tmp_path):
    code = {"auto_map": {"AutoConfig": "configuration_llama.LlamaConfig"}}
    folders.llama(tmp_path / "in", **code)
    convert.convert(convert.open_source(tmp_path / "in"), tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


OLDER = {"llama", "llama-linear", "llama-dynamic", "qwen2", "phi3", "deepseek-v3", "gpt-neox", "mixtral", "mistral"}


@pytest.mark.parametrize("name", sorted(OLDER))
def test_an_export_says_the_rotation_for_transformers_4_too(name, tmp_path):
    """Its keys alone, and those of transformers 5 alone, are the same model; and its class reads both together."""
    kind, changes = peers.FAMILIES[name]
    base = peers.ATTENTION | {"rope_parameters": dict(peers.ROPE), "vocab_size": 96, "num_hidden_layers": 2}
    base = {key: value for key, value in base.items() if kind != "GPTNeoX" or key != "num_key_value_heads"}
    config = json.loads(json.dumps(getattr(transformers, f"{kind}Config")(**base | changes).to_dict()))
    described = families.describe_config(config, "config.json")
    lm = from_config.from_config(from_config.complete_model(described.model))
    written = to_hf.config_of(config["model_type"], lm, canonical(lm), described.max_positions)
    both = written | rope_parameters.older_keys(written)
    older = {key: value for key, value in both.items() if key != "rope_parameters"}
    for description in (both, older, written):
        described = families.describe_config(description, "config.json").model
        model = from_config.from_config(from_config.complete_model(described))
        assert not differences(canonical(model), canonical(lm))
    assert older["rotary_emb_base" if kind == "GPTNeoX" else "rope_theta"] == 500.0
    read = getattr(transformers, f"{kind}Config")(**{key: value for key, value in both.items() if key != "model_type"})
    parameters = {key: value for key, value in read.rope_parameters.items() if key in written["rope_parameters"]}
    expected = {key: value for key, value in written["rope_parameters"].items() if key in parameters}
    assert parameters == expected
