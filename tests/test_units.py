"""The small parts of a run, each by itself."""

import logging
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import contract
from configs import base
from efficientllm import model
from efficientllm.architecture import from_config
from efficientllm.errors import UserError
from efficientllm.infer.generate import generate
from efficientllm.ops import attention
from efficientllm.ops.attention import Context, Mask, attend
from efficientllm.optim import rules
from efficientllm.registry import build
from efficientllm.train import charts, measure, step
from efficientllm.train.progress import Countdown, Progress, clock_time
from efficientllm.weights import matmul
from tiers import slow_case


def test_optimizer_is_adamw_with_decay_and_rates_by_name():
    train = base.get_config().train
    train.rates, train.clip = (("b$", 0.5), (".*", 1.0)), 0.0
    train.decay = (("kernel$", 0.1), (".*", 0.0))
    params = {"kernel": jnp.full((2, 3), 2.0), "b": jnp.ones(3)}
    grads = {"kernel": jnp.linspace(-1, 1, 6).reshape(2, 3), "b": jnp.array([0.3, -2.0, 1.0])}
    tx, lr = rules.optimizer(train, params), rules.schedule(train)
    reference = {
        "kernel": optax.adamw(lr, b1=0.9, b2=0.95, weight_decay=0.1),
        "b": optax.adamw(lambda count: 0.5 * lr(count), b1=0.9, b2=0.95, weight_decay=0.0),
    }
    state, states = tx.init(params), {name: each.init(params[name]) for name, each in reference.items()}
    for _ in range(40):
        updates, state = tx.update(grads, state, params)
        for name, each in reference.items():
            expected, states[name] = each.update(grads[name], states[name], params[name])
            np.testing.assert_allclose(updates[name], expected, rtol=1e-6, atol=1e-9)
        params = optax.apply_updates(params, updates)


def test_rules_must_cover_every_parameter():
    with pytest.raises(UserError, match="covers no parameter 'a/b'"):
        rules.match((("c", 1.0),), {"a": {"b": 1.0}}, "config.train.decay")
    with pytest.raises(UserError, match="pairs of"):
        rules.match((("(", 1.0),), {"a": 1.0}, "config.train.decay")


@pytest.mark.parametrize("name", ["cosine(peak=2.0, warmup=0.1, final=0.1)", "linear(peak=2.0, warmup=0.1, final=0.1)"])
def test_schedules_warm_up_to_the_peak_and_end_at_the_final_share(name):
    lr = build("schedule", name, steps=100)
    assert lr(0) == 0 and lr(5) == pytest.approx(1.0) and lr(10) == pytest.approx(2.0)
    assert lr(100) == pytest.approx(0.2) and lr(40) > lr(60)
    assert build("schedule", "constant(peak=2.0)", steps=100)(100) == 2.0


def test_accumulation_changes_nothing_even_where_targets_are_missing():
    lm, batch = contract.build("mixer", "gqa"), contract.batch()
    batch["weights"] = (np.random.default_rng(0).random(batch["weights"].shape) < 0.5).astype(np.float32)
    run = jax.jit(lambda p, n: step.gradients(lm, p, batch, n), static_argnums=1)
    (grads, metrics), (split_grads, split_metrics) = (run(contract.parameters(lm), n) for n in (1, 4))
    np.testing.assert_allclose(metrics["loss"], split_metrics["loss"], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, split_grads)


@pytest.mark.parametrize("kernel", ["xla", slow_case("chunked"), "gathered"])
@pytest.mark.parametrize("length", [slow_case(1), slow_case(63), slow_case(64), 130])
def test_attention_kernels_against_plain_numpy(kernel, length, monkeypatch):
    monkeypatch.setattr(attention, "GATHERED_CHUNK", 8)
    rng = np.random.default_rng(length)
    q, k, v = (rng.normal(size=(2, length, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    segments = np.sort(rng.integers(1, 4, (2, length)), axis=1)
    scores = np.einsum("bthk,bshk->bhts", q, np.repeat(k, 2, 2)) / np.sqrt(8)
    visible = np.tril(np.ones((length, length), bool)) & (segments[:, :, None] == segments[:, None, :])
    scores = np.where(visible[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdims=True), np.repeat(v, 2, 2))
    found = attend(q, k, v, Mask(segments_BT=jnp.asarray(segments)), kernel)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_mixed_products_round_their_operands_and_nothing_else():
    rng = np.random.default_rng(0)
    x, w, dy = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 5, 16), (16, 8), (3, 5, 8)))
    low = lambda a: np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32)  # noqa: E731
    y, back = jax.vjp(lambda x, w: matmul(x, w, "mixed"), x, w)
    dx, dw = back(jnp.asarray(dy))
    assert y.dtype == dx.dtype == dw.dtype == jnp.float32
    np.testing.assert_allclose(y, low(x) @ low(w), atol=1e-5)
    np.testing.assert_allclose(dx, low(dy) @ low(w).T, atol=1e-5)
    np.testing.assert_allclose(dw, np.einsum("btd,btf->df", low(x), low(dy)), atol=1e-5)


@pytest.mark.slow
def test_generation_is_the_argmax_of_the_full_pass_and_stops_at_the_end_of_text():
    lm = contract.build("mixer", "gqa")
    params, prompt = contract.parameters(lm), contract.tokens()[:2, :5]
    found = np.asarray(generate(lm, params, prompt, 6, 0, jax.random.key(0), eos_id=-1))
    text = prompt
    for _ in range(6):
        text = np.concatenate([text, np.argmax(contract.logits(lm, text)[:, -1:], -1)], 1)
    np.testing.assert_array_equal(found, text[:, 5:])
    eos = int(found[0, 2])
    stopped = np.asarray(generate(lm, params, prompt[:1], 6, 0, jax.random.key(0), eos_id=eos))[0]
    first = list(found[0]).index(eos)
    assert list(stopped[: first + 1]) == list(found[0, : first + 1]) and set(stopped[first:]) == {eos}


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["gqa", "window(window=5)"])
def test_a_kernel_for_training_does_not_change_what_is_generated(mixer):
    prompt = contract.tokens()[:2, :7]
    texts = []
    for kernel in ("auto", "chunked", "splash"):
        lm = contract.build("mixer", mixer, attention_kernel=kernel)
        params = contract.parameters(contract.build("mixer", mixer))
        texts.append(np.asarray(generate(lm, params, prompt, 6, 0, jax.random.key(0), eos_id=-1)))
    np.testing.assert_array_equal(texts[0], texts[1])
    np.testing.assert_array_equal(texts[0], texts[2])


@pytest.mark.slow
def test_layers_compiled_one_after_another_are_the_same_function(monkeypatch):
    lm = contract.build("mixer", "gqa")
    run = lambda: jax.jit(lambda p: contract.loss_and_gradients(lm, p))  # noqa: E731
    loop, text = run()(contract.parameters(lm)), run().lower(contract.parameters(lm)).as_text()
    monkeypatch.setattr(model, "UNROLLED", 12)
    apart, apart_text = run()(contract.parameters(lm)), run().lower(contract.parameters(lm)).as_text()
    assert "while" in text and "while" not in apart_text
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), loop, apart)


def test_untied_embeddings_and_a_hybrid_pattern():
    lm = contract.build("mixer", "gqa", tied=False, pattern=("mha", "mqa | gelu"))
    tokens = jnp.zeros((1, 8), jnp.int32)
    boxed = jax.eval_shape(lambda: lm.init(jax.random.key(0), tokens, Context.packed(tokens)))["params"]
    params = nn.unbox(boxed)
    assert params["head"]["kernel"].shape == (32, contract.VOCAB)
    assert params["groups"]["block_1"]["ffn"].keys() == {"up", "down"}
    with pytest.raises(UserError, match="2 layers are no multiple"):
        contract.build("mixer", "gqa", pattern=("mha", "mqa", "gqa"))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused():
    config = base.get_config().model
    config.size = "tiny(vocab_size=100)"
    assert from_config.from_config(config, 90).vocab_size == 100
    with pytest.raises(UserError, match="has 101 tokens"):
        from_config.from_config(config, 101)


def test_charts_name_layers_across_groups():
    stats = {"load": np.array([[0.25, 0.75], [0.5, 0.5]]), "entropy": np.array([0.1, 0.2])}
    metrics = dict.fromkeys(("loss", "total_loss", "learning_rate", "grad_norm"), 1.0)
    shown = charts.scalars(metrics | {"aux": ({}, {"stats": stats, "losses": {"z_loss": np.array([1.0, 3.0])}})}, 2)
    assert shown["z_router/load/layer_01/expert_1"] == 0.75 and shown["z_router/entropy/layer_03"] == 0.2
    assert shown["z_router/z_loss/block_1"] == 2.0 and "z_router/load/layer_00/expert_0" not in shown


def test_progress_line_has_step_loss_rate_and_time_left():
    now = iter([0.0, 2.0, 4.0])
    progress = Progress(100, clock=lambda: next(now))
    progress.add(1000)
    assert progress.line(1, 5.0) == "step   1/100  loss 5.0000"
    progress.add(1000)
    progress.add(1000)
    assert progress.line(3, 4.5) == "step   3/100  loss 4.5000  500 tokens/s  3:14 left"
    assert clock_time(3723) == "1:02:03"


class FakeReader:
    def __init__(self):
        self.calls = []

    def start(self):
        self.calls.append("start")

    def stop(self):
        self.calls.append("stop")
        return "window"

    def faults(self):
        return []


def test_measurement_counts_steady_steps_inside_segments_only():
    times = iter(range(1000))
    reader, sampler = (
        FakeReader(),
        types.SimpleNamespace(mark=lambda: "mark", since=lambda mark: "averages", stopped_s=float),
    )
    measured = measure.Measurement(reader, sampler, clock=lambda: float(next(times)))
    measured.restart_clock()
    while not measured.steady:
        measured.step_done(10)
    warm = len(measured.timer.discarded)
    assert warm == 5 and measured.tokens == 0
    measured.step_done(10)  # steady, but between segments
    measured.start()
    for _ in range(3):
        measured.step_done(10)
    measured.stop()
    measured.stop()
    assert (measured.tokens, measured.steps, measured.seconds) == (30, 3, 3.0)
    measured.start()
    measured.step_done(10)
    measured.abandon()
    assert (measured.tokens, measured.steps) == (30, 3)
    assert measured.windows == ["window"] and reader.calls == ["start", "stop"] * 2


def test_a_countdown_speaks_at_most_every_few_seconds(caplog, monkeypatch):
    log = logging.getLogger("efficientllm")
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(log, "handlers", [])  # those that earlier tests' runs opened
    log.setLevel(logging.INFO)
    now = iter((0, 4, 8, 16, 17, 40))
    countdown = Countdown("measuring", 10, every_s=5, clock=lambda: next(now))
    for _ in range(4):
        countdown.add(2)
    countdown.add(2)
    assert caplog.messages == ["measuring: 40%, 0:12 left", "measuring: 60%, 0:11 left"]


@pytest.mark.parametrize(
    "spec", ["cosine(peak=1.0, warmup={})", "linear(peak=1.0, warmup={})", "constant(peak=1.0, warmup={})"]
)
@pytest.mark.parametrize("warmup, steps", [(0.99, 10), (0.6, 1), (0.01, 3), (0.0, 1)])
def test_a_schedule_reaches_its_peak_within_its_steps(spec, warmup, steps):
    rates = [float(build("schedule", spec.format(warmup), steps=steps)(step)) for step in range(steps)]
    assert max(rates) == pytest.approx(1.0) and min(rates) >= 0
