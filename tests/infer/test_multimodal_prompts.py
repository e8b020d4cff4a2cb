"""Generation with images: the greedy tokens of transformers, with rows of other lengths beside a row and without."""

import numpy as np
import pytest

from convert import vision_folders as folders
from convert.test_vision_parity import loaded, prompts
from convert.vision_folders import torch
from efficientllm.convert.check_vision import reference_inputs
from efficientllm.infer.engine import Engine
from efficientllm.infer.multimodal_prompts import encode_prompts
from efficientllm.registry import build
from efficientllm.vision.token_rows import Prompt, make_batch
from tiers import slow_except

pytestmark = pytest.mark.xdist_group("vision")
NEW = 12
GRIDS = [(1, 10, 14), (1, 8, 4), (1, 6, 4)]


def generated(name, rows, chunked=False):
    """The tokens that the engine generates for each prompt."""
    _, lm, params = loaded(name)
    ids, images = encode_prompts(lm, params, rows)
    engine = Engine(lm, params, build("sampler", "greedy"), -1, max(map(len, ids)) + NEW, chunked)
    *_, tokens = engine.generate(ids, NEW, images=images)
    return tokens


def of_transformers(name, prompt):
    lm = loaded(name)[1]
    made = make_batch(lm, [prompt])
    inputs = reference_inputs(lm, made, [prompt])
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        ids = folders.reference(name).generate(**inputs, **options)
    return ids[0, made.tokens_BT.shape[1] :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_except(folders.MODELS, "qwen2.5"))
def test_greedy_tokens_are_those_of_transformers(name):
    """Of two prompts of different lengths together, and of a prompt alone; with text alone, too."""
    rows = prompts(name, GRIDS)
    expected = [of_transformers(name, row) for row in rows]
    assert generated(name, rows) == expected
    assert generated(name, rows[:1]) == expected[:1]
    text = [Prompt([3, 5, 7, 9], (), "text"), rows[1]]
    assert generated(name, text) == [of_transformers(name, text[0]), expected[1]]
    assert len({tuple(row) for row in expected}) == 2 and len(set(np.concatenate(expected).tolist())) > 2


def test_chunks_of_equal_prompts_change_nothing():
    rows = prompts("qwen2.5", GRIDS)[:1] * 2
    assert generated("qwen2.5", rows, chunked=True) == generated("qwen2.5", rows)
