"""A small vision-language model learns to read digits: a dead way of gradients through the tower would show."""

import flax.linen as nn
import jax
import numpy as np
import pytest

import runs
from configs import digits_vl
from efficientllm import convert, main, model
from efficientllm.data.text import TextData
from efficientllm.registry import build
from efficientllm.vision.examples import ExampleData
from efficientllm.vision.processors import read_processor

pytest.importorskip("sklearn")
pytestmark = [pytest.mark.xdist_group("vision"), pytest.mark.slow]  # a minute


def test_held_out_digits_are_read(tmp_path):
    """Greedy answers, the end of the answer included, are exactly right for 95 % of the held-out digits."""
    assert main.main([f"--config={runs.ROOT}/configs/digits_vl.py", f"--workdir={tmp_path / 'run'}"]) == 0
    config, source = digits_vl.get_config(), convert.open_source(tmp_path / "run")
    tokenizer = build("tokenizer", config.tokenizer).fit(None)
    data = ExampleData(
        TextData(config.data, tokenizer, config.train.length), source.lm(), read_processor(None, source.lm())
    )
    lm = data.model(source.lm())
    params = source.load(nn.unbox(model.abstract_params(lm)), lm=lm)
    apply = jax.jit(lambda batch: lm.apply({"params": params}, batch["tokens"], lm.context(batch))[0].argmax(-1))
    right = []
    for batch in data.held_out(config.train.batch_size):
        is_right = np.asarray(apply(batch)) == batch["targets"]
        for row in range(len(is_right)):
            is_answer = batch["weights"][row] > 0
            segments = batch["segments"][row]
            right += [
                is_right[row][is_answer & (segments == segment)].all() for segment in np.unique(segments[is_answer])
            ]
    assert len(right) == len(data.sides["held_out"]) > 300 and np.mean(right) >= 0.95
