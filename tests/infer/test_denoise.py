"""Sampling of pictures: guidance, meshes, seeds, chunks, and the compiled loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fake_denoisers as fake
from efficientllm import sharding
from efficientllm.embeds.condition import Condition
from efficientllm.errors import UserError
from efficientllm.infer import denoise
from efficientllm.objectives.ddpm import DDPM
from efficientllm.objectives.flow import Flow
from efficientllm.registry import build

pytestmark = pytest.mark.quick
SHAPE = (4, 4, 3)
LABELS = jnp.array([1, 7, 3, 0, 9, 2, 2, 5])
CLASSES = Condition(LABELS)
CASES = {
    "ddpm": ("ddpm(steps=6)", DDPM()),
    "ddim": ("ddim(steps=5)", DDPM()),
    "euler": ("euler(steps=4, shift=3.0)", Flow()),
    "unipc": ("unipc(steps=6, shift=3.0)", Flow()),
}


def sampler(name, guidance=1.0, channels=0, function=fake.wave):
    spec, objective = CASES[name]
    model = fake.Fixed(function, learned_sigma=name.startswith("dd"))
    return denoise.DiffusionSampler(model, objective, build("solver", spec), guidance, channels)


def parameters(name):
    """Small ones: x grows to hundreds, and a sine of hundreds would enlarge rounding at each step."""
    return {"kernel": 0.05 * fake.kernel(outputs=6 if name.startswith("dd") else 3)["kernel"]}


def by_hand(name, guidance, channels, params, key, index, label):
    """One picture by a loop over steps, with two calls of the model at each and noise of the picture's key and step."""
    spec, objective = CASES[name]
    solver, key = build("solver", spec), jax.random.fold_in(key, index)
    tables = {name: np.float32(table) for name, table in solver.tables(objective).items()}
    noise = [jax.random.normal(jax.random.fold_in(key, step), SHAPE) for step in range(solver.steps + 1)]
    x = noise.pop()
    memory = solver.memory(x)
    for step in range(solver.steps):
        row = {name: table[step] for name, table in tables.items()}
        with_label, without = (fake.wave(x[None], row["level"], y, params)[0] for y in (label, 10))
        guided = without + guidance * (with_label - without)
        guided = jnp.concatenate([guided[..., :channels], with_label[..., channels:]], -1)
        x, memory = solver.step(row, x, guided, memory, noise[step] if solver.draws else None)
    return x


@pytest.mark.parametrize(
    "name, guidance, channels", [("ddpm", 4.0, 2), ("ddim", 4.0, 3), ("euler", 1.0, 3), ("unipc", 3.0, 3)]
)
def test_the_loop_is_that_by_hand(name, guidance, channels):
    """Guidance of some channels and of all; the variance and the other channels are those with the label."""
    key = jax.random.key(3)
    params = parameters(name)
    actual = sampler(name, guidance, channels % 3).sample(params, CLASSES, key, SHAPE)
    loop = functools.partial(by_hand, name, guidance, channels, params, key)
    expected = jax.jit(jax.vmap(loop))(jnp.arange(len(LABELS)), LABELS)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
def test_a_seed_gives_the_same_pictures_on_eight_devices(name):
    key, params = jax.random.key(5), parameters(name)
    alone = sampler(name, 3.0).sample(params, CLASSES, key, SHAPE)
    with jax.set_mesh(sharding.make_mesh("data=8")):
        split = sampler(name, 3.0).sample(params, CLASSES, key, SHAPE)
    assert len(split.sharding.device_set) == 8 and split.sharding.shard_shape(split.shape)[0] == 1
    np.testing.assert_allclose(alone, split, rtol=1e-5, atol=1e-5 * np.abs(alone).max())
    assert np.abs(alone - sampler(name, 3.0).sample(params, CLASSES, jax.random.key(6), SHAPE)).min() > 0


def test_a_picture_does_not_depend_on_those_beside_it():
    key, params, loop = jax.random.key(5), parameters("ddpm"), sampler("ddpm", 2.0)
    whole = loop.sample(params, CLASSES, key, SHAPE)
    last = loop.sample(params, CLASSES[5:], key, SHAPE, first=5)
    np.testing.assert_allclose(whole[5:], last, rtol=1e-5, atol=1e-5)


def test_guidance_one_calls_the_model_with_half_of_the_rows():
    rows = []

    def spy(x, level, label, params):
        rows.append(len(x))
        return fake.wave(x, level, label, params)

    for guidance in (1.0, 2.0):
        sampler("euler", guidance, function=spy).sample(parameters("euler"), CLASSES, jax.random.key(0), SHAPE)
    assert set(rows[: len(rows) // 2]) == {8} and set(rows[len(rows) // 2 :]) == {16}


def test_the_steps_are_one_scan_with_one_call_of_the_model():
    traced = sampler("ddpm", 2.0).trace(parameters("ddpm"), 8, SHAPE)
    scans = [equation for equation in traced.jaxpr.eqns if equation.primitive.name == "scan"]
    assert [scan.params["length"] for scan in scans] == [6]
    inside = [equation.primitive.name for equation in scans[0].params["jaxpr"].eqns]
    assert inside.count("dot_general") == 1 and "dot_general" not in [e.primitive.name for e in traced.jaxpr.eqns]


def test_a_trace_makes_no_array(monkeypatch):
    """Nor may the plan of a request, for devices that are not attached."""
    made, key, params = [], jax.random.key, parameters("euler")
    monkeypatch.setattr(jax.random, "key", lambda seed: made.append(key(seed)) or made[-1])
    sampler("euler").trace(params, 2, SHAPE)
    assert made and all(isinstance(array, jax.core.Tracer) for array in made)


@pytest.mark.parametrize("name", ("ddpm", "unipc"))
def test_chunks_show_progress_compile_once_and_can_be_interrupted(name):
    key, params, loop, finished = jax.random.key(1), parameters(name), sampler(name), []
    whole = loop.sample(params, CLASSES, key, SHAPE)
    chunks = loop.sample(params, CLASSES, key, SHAPE, chunk=2, after_chunk=finished.append)
    assert finished == [2, 4, 6]
    np.testing.assert_allclose(whole, chunks, rtol=1e-6, atol=1e-6)
    assert loop._steps._cache_size() == 2  # all steps, and two

    def stop(steps):
        raise KeyboardInterrupt(steps)

    with pytest.raises(KeyboardInterrupt, match="3"):
        loop.sample(params, CLASSES, key, SHAPE, chunk=5, after_chunk=stop)
    assert [denoise.chunk_size(28, most) for most in (0, 1, 5, 13, 28, 99)] == [28, 1, 4, 7, 28, 28]


def test_sampling_once_is_sampling_with_a_kept_program():
    key, params = jax.random.key(1), parameters("euler")
    spec, objective = CASES["euler"]
    once = denoise.sample(fake.Fixed(fake.wave), params, objective, build("solver", spec), CLASSES, key, SHAPE, 2.0)
    np.testing.assert_array_equal(once, sampler("euler", 2.0).sample(params, CLASSES, key, SHAPE))


def test_what_is_refused():
    with pytest.raises(UserError, match="config.infer.guidance_channels = 4: the model predicts 3; give no more"):
        sampler("euler", 2.0, 4)
    with pytest.raises(UserError, match="euler samples from models of"):
        denoise.DiffusionSampler(fake.Fixed(fake.wave), DDPM(), build("solver", "euler"))


def test_a_negative_condition_stands_in_the_place_of_none():
    """That of no class gives what guidance without one gives; another class gives something else."""
    key, params = jax.random.key(3), parameters("euler")
    guided = sampler("euler", 3.0)
    none, given, other = (
        guided.sample(params, CLASSES, key, SHAPE, negative=negative)
        for negative in (None, Condition(jnp.full(8, 10)), Condition(jnp.full(8, 4)))
    )
    np.testing.assert_allclose(none, given, rtol=1e-6, atol=1e-6)
    assert np.abs(none - other).max() > 1e-2
