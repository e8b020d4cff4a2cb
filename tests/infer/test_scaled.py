"""Rotations that depend on how long a text is: prompts of several lengths, in one batch and alone, as transformers has
them; and texts that grow past the original length."""

import copy

import numpy as np
import pytest

from convert import peers
from efficientllm import convert
from efficientllm.infer.engine import Engine
from efficientllm.infer.samplers import Greedy
from efficientllm.ops.attention import Context
from tiers import slow_case, slow_except

ORIGINAL = 32
FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.5, 1.6, 1.8], "long_factor": [1.0, 2.0, 4.0, 6.0, 7.0, 9.0]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 500.0, "original_max_position_embeddings": ORIGINAL} | FACTORS
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 3.0}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
KINDS = {
    "phi3-longrope": ("Phi3", LONGROPE, {"original_max_position_embeddings": ORIGINAL, "max_position_embeddings": 128}),
    "llama-longrope": ("Llama", LONGROPE, {"max_position_embeddings": 128}),
    "llama-dynamic": ("Llama", DYNAMIC, {"max_position_embeddings": ORIGINAL}),
    "llama-yarn": ("Llama", YARN, {"max_position_embeddings": ORIGINAL}),
    "llama-linear": ("Llama", DYNAMIC | {"rope_type": "linear"}, {"max_position_embeddings": ORIGINAL}),
}
LENGTHS = (27, 32, 33, 41)
NEW = 8


@pytest.fixture(params=slow_except(KINDS, "phi3-longrope", "llama-dynamic"), scope="module")
def both(request, tmp_path_factory):
    """`(theirs, our LM, its parameters)` of one model; what theirs remembers of lengths is in its copies alone."""
    kind, rope, changes = KINDS[request.param]
    name = f"scaled {request.param}"  # references are cached by name
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(peers.FAMILIES, name, (kind, {"rope_parameters": dict(rope)} | changes))
        theirs = peers.reference(name)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    source = convert.open_source(folder)
    lm = source.lm()
    return theirs, lm, source.load(peers.abstract(lm))


def generated(theirs, prompt):
    """Greedy tokens of transformers, alone."""
    theirs = copy.deepcopy(theirs)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = peers.torch.tensor([prompt])
    return theirs.generate(ids, attention_mask=peers.torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def prompts(lengths):
    random = np.random.default_rng(0)
    return [random.integers(0, peers.VOCAB, length).tolist() for length in lengths]


@pytest.mark.slow
@pytest.mark.parametrize("pieces, chunk", [slow_case(False, None), (True, 5)])
def test_prompts_of_several_lengths(both, pieces, chunk):
    """Each as it would be alone, short of the original length, across it and beyond."""
    theirs, lm, params = both
    rows = prompts(LENGTHS)
    engine = Engine(lm, params, Greedy(), -1, max(LENGTHS) + NEW, chunked=pieces)
    *_, completions = engine.generate(rows, NEW, chunk=chunk)
    assert completions == [generated(theirs, prompt) for prompt in rows]


@pytest.mark.parametrize("length", [33, 100])
def test_logits_far_beyond(both, length):
    theirs, lm, params = both
    ids = peers.tokens(length=length)
    peers.close(peers.our_logits(lm, params, ids), peers.their_logits(copy.deepcopy(theirs), ids), 1e-5)


def test_a_row_does_not_depend_on_its_neighbours(both):
    """Packed to one width: a row's own length says how it is turned."""
    _, lm, params = both
    positions = np.stack([np.arange(40), np.minimum(np.arange(40), 19)]).astype(np.int32)
    ids = peers.tokens(length=40)
    together = lm.apply({"params": params}, ids, Context.packed(positions))[0][1, :20]
    alone = lm.apply({"params": params}, ids[1:, :20], Context.packed(positions[1:, :20]))[0][0]
    np.testing.assert_allclose(together, alone, atol=2e-5)
