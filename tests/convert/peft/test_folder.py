"""peft's folders of some kernels, some layers and several ranks; and those that are refused, in one clear line."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import folders, peers
from convert.peft.test_peft import kernels, ours, theirs
from efficientllm import convert
from efficientllm.convert import peft
from efficientllm.convert.peft.adapter_config import read_config
from efficientllm.errors import UserError
from efficientllm.registry import build
from efficientllm.untrusted import patterns
from tiers import slow_case


@pytest.mark.parametrize("name", ["dora", slow_case("rslora"), slow_case("pissa")])
def test_a_folder_may_adapt_some_of_the_kernels(source, name, tmp_path):
    """peft's default for a Llama: queries and values."""
    tuned, ids = theirs(source, name, target_modules=["q_proj", "v_proj"]), peers.tokens()
    tuned.save_pretrained(tmp_path / "adapter")
    lm, params = ours(source, name, tmp_path / "adapter")
    assert sum(isinstance(leaf, np.ndarray | jax.Array) for _, _, leaf, _ in kernels(lm, source, params)) == 5 * 2
    expected = peers.their_logits(tuned, ids)
    peers.close(peers.our_logits(lm, params, ids), expected, 1e-5)
    convert.merge_into(source, tmp_path / "adapter", tmp_path / "merged")
    merged = convert.open_source(tmp_path / "merged").load(peers.abstract(lm))
    peers.close(peers.our_logits(lm, merged, ids), expected, 1e-5)


@pytest.mark.parametrize("name", ["dora", "pissa"])
def test_a_folder_may_adapt_some_of_the_layers(source, name, tmp_path):
    tuned, ids = theirs(source, name, target_modules=["q_proj"], layers_to_transform=[1]), peers.tokens()
    tuned.save_pretrained(tmp_path / "adapter")
    lm, params = ours(source, name, tmp_path / "adapter")
    peers.close(peers.our_logits(lm, params, ids), peers.their_logits(tuned, ids), 1e-5)


def test_a_folder_may_have_several_ranks(source, tmp_path):
    """Merged it may differ from layer to layer too; the kernels of ours stack their layers."""
    lm, ids = source.lm(), peers.tokens()
    for pattern in ("mlp.up_proj", "layers.1.mlp.up_proj"):
        where, ranks = tmp_path / pattern, {"rank_pattern": {pattern: 2}, "alpha_pattern": {"up_proj": 5}}
        tuned = theirs(source, "lora", target_modules=r".*(q_proj|up_proj)", **ranks)
        tuned.save_pretrained(where)
        expected = peers.their_logits(tuned, ids)
        convert.merge_into(source, where, tmp_path / f"{pattern}-merged")
        merged = convert.open_source(tmp_path / f"{pattern}-merged").load(peers.abstract(lm))
        peers.close(peers.our_logits(lm, merged, ids), expected, 1e-5)
        if pattern.startswith("mlp"):
            peers.close(peers.our_logits(*ours(source, "lora", where), ids), expected, 1e-5)
    with pytest.raises(UserError, match="stacked layers share theirs; merge"):
        ours(source, "lora", where)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"r": "4"}, "r = '4' must be a number"),
        ({"r": None}, "r = None must be a number"),
        ({"lora_alpha": None}, "lora_alpha = None must be a number"),
        ({"r": 0}, "rank = 0: must be at least 1"),
        ({"use_dora": True, "init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' together with dora"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora'"),
        ({"rank_pattern": {"q_proj": "8"}}, "rank_pattern: q_proj = '8' must be a number"),
        ({"alpha_pattern": {"(": 8}}, "alpha_pattern: '(' is no regex"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
        ({"peft_type": []}, "peft_type = []; only"),
        ({"peft_type": {"": 0}}, "only LORA"),
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA'"),
        (None, "holds []; an object is needed"),
        ({"lora_alpha": float("inf")}, "lora_alpha = inf is too large"),
        ({"lora_alpha": float("nan")}, "NaN is no number"),
        ({"r": 10**9}, "r = 1000000000 is too large"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "alpha_pattern: q_proj = inf is too large"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern: q_proj = -1 must be more than 0"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: q_proj = 0 must be more than 0"),
    ],
)
def test_a_config_that_we_do_not_compute_is_refused(change, message, tmp_path):
    config = [] if change is None else {"peft_type": "LORA", "r": 4, "lora_alpha": 6} | change
    (tmp_path / peft.CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        build("adapter", peft.read_spec(tmp_path))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("suffix", ["lora_A", "lora_B"])
def test_numbers_that_are_none_are_not_merged(suffix, value, tmp_path):
    """3e38 is a number; its product with others is none."""
    base = folders.llama(tmp_path / "base")
    shapes = {name: w.shape for name, w in base.items() if "q_proj" in name}
    tensors = folders.adapter(tmp_path / "adapter", shapes, 2)
    name = next(name for name in tensors if suffix in name)
    save_file(tensors | {name: np.full_like(tensors[name], value)}, tmp_path / "adapter" / peft.TENSORS)
    message = "makes NaN or infinity of its weight" if value == 3e38 else f"tensor '{name}' holds NaN or infinity"
    with pytest.raises(UserError, match=message):
        convert.merge_into(convert.open_source(tmp_path / "base"), tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pattern_that_backtracks_is_refused_in_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "rank_pattern": {"(a|aa)+!": 2}}
    (tmp_path / peft.CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match="takes more than 0.2 s to match"):
        read_config(tmp_path).rank_of("a" * 60)


def test_an_adapter_of_another_family_is_refused(source, tmp_path):
    name = f"{peft.PREFIX}gpt_neox.layers.0.attention.query_key_value.lora_A.weight"
    save_file({name: np.zeros((4, 48), np.float32)}, tmp_path / peft.TENSORS)
    (tmp_path / peft.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 6}))
    with pytest.raises(UserError, match="an adapter of another model"):
        ours(source, "lora", tmp_path)


def test_what_is_no_adapter_of_this_model_is_refused(source, tmp_path):
    theirs(source, "lora").save_pretrained(tmp_path / "adapter")
    lm = source.lm()
    params = source.load(peers.abstract(lm))
    config = (tmp_path / "adapter" / peft.CONFIG).read_text()
    for change, message in ((('"r": 4', '"r": 5'), "another model or rank"), (('"none"', '"all"'), "bias = 'all'")):
        (tmp_path / "adapter" / peft.CONFIG).write_text(config.replace(*change))
        with pytest.raises(UserError, match=message):
            peft.around(source, lm, params, tmp_path / "adapter")
    (tmp_path / "adapter" / peft.TENSORS).unlink()
    (tmp_path / "adapter" / peft.CONFIG).write_text(config)
    with pytest.raises(UserError, match="is missing: no folder of an adapter"):
        peft.around(source, lm, source.load(peers.abstract(lm)), tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(UserError, match="adapter_model.bin is a pickle, which is never loaded"):
        peft.around(source, lm, source.load(peers.abstract(lm)), tmp_path / "adapter")
