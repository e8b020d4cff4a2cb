"""What objectives of noisy pictures share: the mesh, micro-batches, weights, router losses, fixed evaluation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fake_denoisers as fake
from efficientllm import sharding
from efficientllm.errors import UserError
from efficientllm.objectives.ddpm import DDPM
from efficientllm.objectives.denoising import LEVEL_LOSSES, fixed_noise
from efficientllm.objectives.flow import Flow

pytestmark = pytest.mark.quick
OBJECTIVES = {"ddpm": (DDPM(), 6), "flow": (Flow(), 3)}


def case(name):
    """(objective, model, parameters)."""
    objective, outputs = OBJECTIVES[name]
    return objective, fake.Fixed(fake.wave, learned_sigma=outputs == 6), fake.kernel(outputs=outputs)


@functools.cache
def evaluate(name):
    """The compiled evaluation of a batch."""
    objective, model, _ = case(name)
    return jax.jit(lambda params, batch: objective.held_out_sums(model, params, batch, None))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_is_the_same_on_any_mesh(name):
    objective, model, params = case(name)
    batch, key = fake.batch(rows=8), jax.random.key(1)

    def step(params, batch):
        def loss(params):
            return objective.loss(model, params, batch, key, objective.totals(batch, 1))[0]

        return jax.value_and_grad(loss)(params)

    alone = jax.jit(step)(params, batch)
    mesh = sharding.make_mesh("data=4, fsdp=2")
    rows = jax.NamedSharding(mesh, jax.P(sharding.BATCH))
    with jax.set_mesh(mesh):
        split = jax.jit(step, in_shardings=(None, rows))(params, jax.device_put(batch, rows))
    np.testing.assert_allclose(alone[0], split[0], rtol=1e-6)
    np.testing.assert_allclose(alone[1]["kernel"], split[1]["kernel"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_without_a_weight_count_for_nothing(name):
    objective, model, params = case(name)
    batch, key = fake.batch(), jax.random.key(1)
    batch["weights"] = jnp.array([1.0, 1.0, 0.0, 0.0])
    other = batch | {"images": batch["images"].at[2:].set(7.0)}

    @jax.jit
    def loss(batch):
        return objective.loss(model, params, batch, key, objective.totals(batch, 1))[0]

    losses = [loss(rows) for rows in (batch, other)]
    assert losses[0] == losses[1] and np.isfinite(losses[0])
    sums = [evaluate(name)(params, rows) for rows in (batch, other)]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), *sums))
    assert objective.counts(model, batch) == {"samples": 2, "tokens": 8}
    assert loss(batch | {"weights": jnp.zeros(4)}) == 0


def test_micro_batches_of_different_weight_count_by_their_pictures():
    """The mean over micro-batches is the sum over pictures by their number, for the loss and the routers' losses."""
    objective = Flow(label_dropout=0.0)
    model = fake.Fixed(fake.wave, aux=({"losses": {"load_balance": jnp.array([2.0, 4.0])}},))
    batch, params, key = fake.batch(), fake.kernel(), jax.random.key(0)
    batch["weights"] = jnp.array([1.0, 1.0, 1.0, 0.0])
    totals = objective.totals(batch, 2)
    assert totals == 1.5
    micros = [jax.tree.map(lambda leaf: leaf[rows], batch) for rows in (slice(0, 2), slice(2, 4))]  # noqa: B023
    loss = jax.jit(lambda micro, totals: objective.loss(model, params, micro, key, totals)[1])
    losses = [loss(micro, totals) for micro in micros]
    own_losses = [loss(micro, objective.totals(micro, 1))["loss"] for micro in micros]
    mean = np.mean([micro_loss["loss"] for micro_loss in losses])
    np.testing.assert_allclose(mean, (2 * own_losses[0] + own_losses[1]) / 3, rtol=1e-6)
    routers = np.mean([micro_loss["total_loss"] - micro_loss["loss"] for micro_loss in losses])
    np.testing.assert_allclose(routers, 3.0, rtol=1e-5)


def test_labels_are_dropped_at_their_rate():
    seen = []

    def spy(x, level, label, params):
        seen[:] = label.ravel().tolist(), level.ravel().tolist()
        return x

    batch = fake.batch(rows=2000)
    Flow(label_dropout=0.25).loss(fake.Fixed(spy), {}, batch, jax.random.key(0), jnp.float32(1))
    labels, levels = np.array(seen[0]), np.array(seen[1])
    assert np.mean(labels == 10) == pytest.approx(0.25, abs=0.03)
    is_kept = labels != 10
    np.testing.assert_array_equal(labels[is_kept], np.asarray(batch["labels"])[is_kept])
    assert abs(np.corrcoef(is_kept, levels)[0, 1]) < 0.07  # whether one is dropped does not depend on its level
    Flow(label_dropout=0.0).loss(fake.Fixed(spy), {}, batch, jax.random.key(0), jnp.float32(1))
    np.testing.assert_array_equal(seen[0], batch["labels"])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_evaluation_is_the_mean_over_fixed_levels_and_noise(name):
    """Against a loop over pictures and levels; however the pictures are batched, and whatever the objective's key."""
    objective, model, params = case(name)
    batch = fake.batch(rows=8)
    whole = objective.held_out([evaluate(name)(params, batch)])
    halves = [jax.tree.map(lambda leaf: leaf[rows], batch) for rows in (slice(0, 4), slice(4, 8))]  # noqa: B023
    split = objective.held_out([evaluate(name)(params, half) for half in halves])
    assert whole == pytest.approx(split, rel=1e-6)
    assert set(whole) == set(objective.units)
    keys = [jax.random.fold_in(jax.random.key(0), identity) for identity in batch["identity"]]
    noise = np.stack([jax.random.normal(key, (4, 4, 3)) for key in keys])
    images, labels = np.asarray(batch["images"]), np.asarray(batch["labels"]).reshape(8, 1, 1, 1)
    losses = []
    for k in range(1, 8):
        if name == "ddpm":
            alpha_bar, level, target = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[125 * k], 125 * k, noise
            x = np.sqrt(alpha_bar) * images + np.sqrt(1 - alpha_bar) * noise
        else:
            x, level, target = (1 - k / 8) * images + k / 8 * noise, 125.0 * k, noise - images
        prediction = np.asarray(fake.wave(np.float32(x), level, labels, params))[..., :3]
        losses.append(np.square(prediction - target).mean())
    assert whole["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    np.testing.assert_allclose([whole[name] for name in LEVEL_LOSSES], losses, rtol=1e-5)


def test_evaluation_without_pictures_is_refused():
    with pytest.raises(UserError, match="^batches: none of the held-out rows is a picture"):
        Flow().held_out([])
    batch = fake.batch() | {"weights": jnp.zeros(4)}
    with pytest.raises(UserError, match="none of the held-out rows"):
        Flow().held_out([evaluate("flow")(fake.kernel(), batch)])


def test_the_noise_of_a_picture_follows_its_content():
    noise = fixed_noise(jnp.uint32([5, 2**32 - 1, 5]), (4, 4, 3))
    np.testing.assert_array_equal(noise[0], noise[2])
    assert (noise[0] != noise[1]).all()


def test_arrays_of_a_batch():
    shapes = Flow().row_shapes(fake.Fixed(fake.wave), 16)
    assert shapes == {name: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for name, leaf in fake.batch().items()}
    axes = Flow().axes(fake.Fixed(fake.wave))
    assert {name: len(names) for name, names in axes.items()} == {name: len(s.shape) for name, s in shapes.items()}


@pytest.mark.parametrize("vlb", [False, True])
def test_ddpm_of_clips_of_one_row_is_that_of_pictures(vlb):
    """A clip whose frames lie one above the other is a picture, at every time of its own."""
    objective, key = DDPM(vlb=vlb), jax.random.key(0)
    images, noise = jax.random.normal(key, (2, 2, 3, 4, 4, 3))
    prediction = jax.random.normal(jax.random.key(1), (2, 3, 4, 4, 6 if vlb else 3))
    times_B = jnp.array([0, 700])

    def losses(*arrays):
        return objective.held_out_losses(*arrays, times_B) | {"noisy": objective.add_noise(*arrays[1:], times_B)}

    clips = losses(prediction, images, noise)
    pictures = losses(*(x.reshape(2, 12, 4, -1) for x in (prediction, images, noise)))
    for name, values in pictures.items():
        np.testing.assert_allclose(clips[name].reshape(values.shape), values, rtol=1e-6, err_msg=name)
