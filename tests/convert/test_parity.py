"""Every family against transformers in float32: a saved folder read by us, and a folder of ours read there."""

import jax
import numpy as np
import pytest

from convert import peers
from convert.peers import transformers
from efficientllm import convert
from tiers import slow_except


@pytest.mark.parametrize("name", slow_except(peers.FAMILIES, "llama", "qwen2", "gpt-neox", "mamba"))
def test_both_directions(name, tmp_path):
    theirs = peers.reference(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ids = peers.tokens()
    expected = peers.their_logits(theirs, ids)

    source = convert.open_source(tmp_path / "theirs")
    lm = source.lm()
    params = source.load(peers.abstract(lm))
    peers.close(peers.our_logits(lm, params, ids), expected, 1e-5)

    # By the family's name: the config.json too is ours.
    convert.export(lm, params, tmp_path / "ours", source.config["model_type"], max_positions=source.max_positions)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", experts_implementation="eager"
    )
    loaded_logits = peers.their_logits(loaded.eval(), ids)
    peers.close(loaded_logits, expected, 1e-6)  # the chunks that it is computed in are no fact of a model
    back = convert.open_source(tmp_path / "ours")
    jax.tree.map(np.testing.assert_array_equal, back.load(peers.abstract(lm)), params)


def test_longrope_within_its_original_length(tmp_path):
    """Other divisors than beyond it, where the test above is."""
    theirs = peers.reference("phi3")
    theirs.save_pretrained(tmp_path)
    source, ids = convert.open_source(tmp_path), peers.tokens(length=12)
    lm = source.lm()
    our_logits = peers.our_logits(lm, source.load(peers.abstract(lm)), ids)
    peers.close(our_logits, peers.their_logits(theirs, ids), 1e-5)


def test_several_files_in_bfloat16(tmp_path):
    """As transformers writes them: read under its index, each value as it is stored."""
    peers.reference("qwen2").to(peers.torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20KB")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=peers.torch.float32, attn_implementation="eager"
    )
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    source, ids = convert.open_source(tmp_path), peers.tokens()
    assert source.stored_dtype == "bfloat16"
    lm = source.lm()
    our_logits = peers.our_logits(lm, source.load(peers.abstract(lm)), ids)
    peers.close(our_logits, peers.their_logits(theirs.eval(), ids), 1e-5)
