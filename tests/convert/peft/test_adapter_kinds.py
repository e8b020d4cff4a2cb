"""Adapters of every kind of peft's, both ways; saved modules, heads, embeddings, resized vocabularies."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import base
from convert import peers
from convert.peft.test_peft import moved, peft, torch
from efficientllm import convert, model
from efficientllm.convert import peft as folder
from efficientllm.errors import UserError
from efficientllm.registry import build
from efficientllm.train import step
from efficientllm.weights import box_as

LINEAR = ["q_proj", "v_proj", "up_proj", "down_proj"]
THEIRS = {
    "loha": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=LINEAR, rank_pattern={"up_proj": 2}),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=5, target_modules=LINEAR),
    "lokr of two products": lambda: peft.LoKrConfig(r=1, alpha=5, target_modules=LINEAR, decompose_both=True),
    "lokr of a factor": lambda: peft.LoKrConfig(r=20, alpha=5, target_modules=LINEAR, decompose_factor=4),
    "glora": lambda: peft.GloraConfig(r=3, target_modules=LINEAR),
    "glora of vectors": lambda: peft.GloraConfig(r=3, target_modules=LINEAR, config_A_B="vector"),
    "glora of numbers": lambda: peft.GloraConfig(r=3, target_modules=LINEAR, config_A_B="constant"),
    "head": lambda: peft.LoraConfig(r=3, target_modules=["q_proj", "lm_head"]),
    "embedding": lambda: peft.LoraConfig(r=3, target_modules=["q_proj", "embed_tokens"]),
    "saved": lambda: peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
    "norms": lambda: peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["norm", "input_layernorm"]),
}


def read(where, ids):
    source = convert.open_source(where)
    lm = source.lm()
    return peers.our_logits(lm, source.load(peers.abstract(lm)), ids)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("kind", THEIRS)
def test_what_peft_writes_is_read_and_merged(source, kind, tmp_path):
    tuned, ids = moved(source, THEIRS[kind]()), peers.tokens()
    tuned.save_pretrained(tmp_path / "adapter")
    expected = peers.their_logits(tuned, ids)
    peers.close(read(tmp_path / "adapter", ids), expected, 1e-5)
    convert.merge_into(source, tmp_path / "adapter", tmp_path / "merged")
    peers.close(read(tmp_path / "merged", ids), expected, 1e-5)


def test_a_resized_vocabulary(source, tmp_path):
    """New tokens, whose rows peft saves with the adapter."""
    plain = peers.transformers.AutoModelForCausalLM.from_pretrained(source.path, attn_implementation="eager")
    plain.resize_token_embeddings(peers.VOCAB + 8, mean_resizing=False)
    tuned = peft.get_peft_model(plain, peft.LoraConfig(r=3, target_modules=["q_proj"])).eval()
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    ids = peers.tokens() + 8
    expected = peers.their_logits(tuned, ids)
    assert expected.shape[-1] == peers.VOCAB + 8
    peers.close(read(tmp_path / "adapter", ids), expected, 1e-5)
    convert.merge_into(source, tmp_path / "adapter", tmp_path / "merged")
    peers.close(read(tmp_path / "merged", ids), expected, 1e-5)


def written(source, spec, where):
    """What we write of random factors, and our parameters."""
    lm, method = source.lm(), build("adapter", spec)
    boxed = model.abstract_params(lm)
    boxed_params = box_as(boxed, source.load(peers.abstract(lm)))
    state = nn.unbox(step.create(lm, base.get_config().train, method, 0, boxed, boxed_params))
    noise = np.random.default_rng(0)
    learnt = jax.tree.map(lambda leaf: leaf + 0.1 * noise.standard_normal(leaf.shape, np.float32), state.params)
    params = step.join(learnt, state.frozen)
    folder.write(lm, spec, params, where, source)
    return lm, params


OURS = [
    "loha(rank=3, alpha=5)",
    "lokr(rank=2, alpha=5)",
    "lokr(rank=30)",
    "glora(rank=3)",
    "glora(rank=2, target='q|up')",
]


@pytest.mark.slow
@pytest.mark.parametrize("spec", OURS)
def test_what_we_write_peft_reads_and_so_do_we(source, spec, tmp_path):
    lm, params = written(source, spec, tmp_path / "adapter")
    ids = peers.tokens(1)
    expected = peers.our_logits(lm, params, ids)
    plain = peers.transformers.AutoModelForCausalLM.from_pretrained(source.path, attn_implementation="eager")
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    peers.close(expected, peers.their_logits(loaded, ids), 1e-5)
    peers.close(read(tmp_path / "adapter", ids), expected, 1e-5)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == source.name


@pytest.mark.parametrize("spec", ["loha(rank=2)", "glora(rank=2, target='/(q|up)/')"])
def test_of_kernels_that_share_a_tensor(spec, tmp_path):
    """Phi-3's queries, keys and values."""
    theirs = peers.reference("phi3-plain")
    theirs.save_pretrained(tmp_path / "base")
    source, ids = convert.open_source(tmp_path / "base"), peers.tokens(1)
    lm, params = written(source, spec, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    peers.close(peers.our_logits(lm, params, ids), peers.their_logits(loaded, ids), 1e-5)
    with pytest.raises(UserError, match="_proj: peft has no lokr of a part of a tensor"):
        written(source, "lokr(rank=2)", tmp_path / "lokr")


def test_the_hub_s_name_is_written_and_not_a_path(source, tmp_path, monkeypatch):
    monkeypatch.chdir(source.path.parent)
    near = convert.open_source(source.path.name)
    written(near, "lora(rank=2)", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == source.path.name


def tied(tmp_path):
    theirs = peers.reference("llama-tied-bias")
    theirs.save_pretrained(tmp_path / "base")
    return convert.open_source(tmp_path / "base")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_modules": ["embed_tokens"]}, "ties"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "ties"),
        ({"target_modules": ["q_proj"], "bias": "all"}, "bias = 'all'|bias = \"all\""),
    ],
)
def test_what_one_model_cannot_be_is_refused_by_name(tmp_path, options, message):
    source = tied(tmp_path)
    moved(source, peft.LoraConfig(r=2, **options)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=message) as error:
        convert.open_source(tmp_path / "adapter")
    assert "\n" not in str(error.value)


def test_parts_that_do_not_fit_are_named(source, tmp_path):
    moved(source, THEIRS["loha"]()).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("hada_w2_b"))
    for change, message in ((tensors[name][:, :-1].copy(), "of shape"), (None, "hada_w2_b is missing")):
        changed = {key: value for key, value in (tensors | {name: change}).items() if value is not None}
        save_file(changed, file)
        with pytest.raises(UserError, match=message):
            read(tmp_path / "adapter", peers.tokens())


def test_every_key_that_peft_writes_of_a_plain_adapter_is_neutral(source, tmp_path):
    """As this version has them, and empty where others do."""
    moved(source, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for key in ("modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication"):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {key: []}))
        assert folder.read_spec(tmp_path).startswith("lora(rank=2")
    assert torch is not None
