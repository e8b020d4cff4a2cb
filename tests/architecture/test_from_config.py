"""Models from a config."""

import pytest

from configs import base
from efficientllm.architecture import from_config
from efficientllm.errors import UserError

pytestmark = pytest.mark.quick


def test_a_tokenizer_larger_than_the_vocabulary_is_refused():
    config = base.get_config().model
    config.unroll = 0
    config.size = "tiny(vocab_size=100)"
    assert from_config.from_config(config, 90).vocab_size == 100
    with pytest.raises(UserError, match="has 101 tokens"):
        from_config.from_config(config, 101)


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"mixer": "rwkv"}, "mixer"),
        ({"mixer": "mha", "ffn": "channel_mix"}, "ffn"),
        ({"pattern": ("mha | swiglu", "rwkv | none")}, "mixer"),
    ],
)
def test_what_reads_tokens_from_start_to_end_is_refused_in_both_directions(changes, key):
    config = base.get_config().model
    config.size = "tiny(num_layers=3, vocab_size=8)"
    config.update(changes)
    from_config.check(config)
    config.embed = "patches(patch=2)"
    with pytest.raises(UserError) as refused:
        from_config.check(config)
    name = "channel_mix" if key == "ffn" else "rwkv"
    message = str(refused.value)
    assert message.startswith(f'config.model.{key} = "{name}(') and "\n" not in message
    assert f"{name!r} reads tokens in causal order, and this model is bidirectional; take one out of" in message
