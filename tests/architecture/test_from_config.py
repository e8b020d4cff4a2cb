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
