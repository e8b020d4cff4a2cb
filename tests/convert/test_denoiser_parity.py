"""DiT against diffusers in float32: predictions, gradients, a trajectory, and files in both directions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import denoiser_folders as folders
from convert.denoiser_folders import WEIGHTS, diffusers, torch
from efficientllm import convert, model, sharding
from efficientllm.convert import check_denoiser
from efficientllm.embeds.condition import Condition
from efficientllm.infer.denoise import DiffusionSampler
from efficientllm.registry import build

pytestmark = pytest.mark.xdist_group("diffusers")

BRANCHES = {
    "learned-sigma": {},
    "plain": {"out_channels": None, "attention_bias": False, "activation_fn": "gelu", "patch_size": 4},
    "one-eps": {"norm_eps": 1e-6, "in_channels": 3, "out_channels": 3},
}


def loaded(folder):
    source = convert.open_source(folder)
    denoiser = source.lm()
    return source, denoiser, source.load(nn.unbox(model.abstract_params(denoiser)))


def inputs(denoiser):
    """Images, levels and a condition; the last label is none."""
    draw = np.random.default_rng(0)
    images = draw.normal(size=(3, denoiser.side, denoiser.side, denoiser.channels)).astype(np.float32)
    labels = np.array([3, 0, denoiser.classes], np.int32)
    return images, np.array([0.0, 321.0, 999.0], np.float32), Condition(labels)


def predict(denoiser, params, *inputs):
    return np.asarray(jax.jit(denoiser.apply)({"params": params}, *inputs)[0])


@pytest.mark.parametrize("branch", BRANCHES)
def test_predictions_of_diffusers_and_files_byte_by_byte(branch, tmp_path):
    reference, folder = folders.reference(**BRANCHES[branch]), folders.saved(**BRANCHES[branch])
    source, denoiser, params = loaded(folder)
    expected = check_denoiser.predict_with(reference, *inputs(denoiser))
    np.testing.assert_allclose(predict(denoiser, params, *inputs(denoiser)), expected, atol=1e-5)
    convert.convert(source, tmp_path / "converted")
    convert.export(denoiser, params, tmp_path / "exported", "DiTTransformer2DModel")  # the config.json too is ours
    for written in ("converted", "exported"):
        assert (tmp_path / written / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
        theirs = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / written).eval()
        np.testing.assert_allclose(check_denoiser.predict_with(theirs, *inputs(denoiser)), expected, atol=1e-6)


def test_predictions_of_the_published_model_and_files_byte_by_byte(tmp_path):
    folder = folders.save_published(tmp_path / "published")
    source, denoiser, params = loaded(folder)
    expected = check_denoiser.predict_with(folders.published_reference(), *inputs(denoiser))
    np.testing.assert_allclose(predict(denoiser, params, *inputs(denoiser)), expected, atol=1e-5)
    convert.convert(source, tmp_path / "converted")
    convert.export(denoiser, params, tmp_path / "exported", "DiT")
    for written in ("converted", "exported"):
        a, b = (path / "model.safetensors" for path in (tmp_path / written, folder))
        assert a.read_bytes() == b.read_bytes()
        assert convert.open_source(tmp_path / written).model == source.model


def test_a_published_model_is_another_than_that_of_diffusers(tmp_path):
    """The frequencies alone move predictions far beyond rounding: the branch is no formality."""
    source, denoiser, params = loaded(folders.save_published(tmp_path / "published"))
    published = predict(denoiser, params, *inputs(denoiser))
    of_diffusers = predict(denoiser.clone(time_denominator=127), params, *inputs(denoiser))
    assert np.abs(published - of_diffusers).max() > 1e-2


def test_gradients(tmp_path):
    """Gradients of all parameters, read from a file of theirs as parameters are. A copy's gradient is the sum's."""
    folder = folders.saved()
    _, denoiser, params = loaded(folder)
    images, levels, condition = inputs(denoiser)
    direction = np.random.default_rng(1).normal(size=(3, 8, 8, 8)).astype(np.float32)

    def loss(params):
        return jnp.sum(denoiser.apply({"params": params}, images, levels, condition)[0] * direction)

    gradients = jax.jit(jax.grad(loss))(params)
    reference = folders.reference()
    reference.zero_grad()
    x, y = (torch.tensor(a.transpose(0, 3, 1, 2).copy()) for a in (images, direction))
    (reference(x, torch.tensor(levels), torch.tensor(condition.labels_B).long()).sample * y).sum().backward()
    theirs = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name in [name for name in theirs if ".emb." in name]:
        theirs[name] = sum(theirs[name.replace(".0.", f".{i}.", 1)] for i in range(2)) if ".0." in name else None
    theirs = {
        name: theirs[name.replace(".1.", ".0.", 1)] if tensor is None else tensor for name, tensor in theirs.items()
    }
    edited = folders.edit(folder, tmp_path / "gradients", **{name: g.numpy().copy() for name, g in theirs.items()})
    _, _, expected = loaded(edited)

    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))

    def close(actual, expected):  # that of a key's bias is 0 but for rounding: a softmax does not see it
        assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max() + 1e-7 * largest

    jax.tree.map(close, gradients, expected)


def test_a_trajectory_of_eight_steps():
    """DDIM with guidance of all channels, as diffusers' pipeline runs it."""
    source, denoiser, params = loaded(folders.saved())
    labels, key, shape = np.array([3, 7], np.int32), jax.random.key(2), (8, 8, 4)
    sampler = DiffusionSampler(denoiser, build("objective", "ddpm()"), build("solver", "ddim(steps=8)"), 4.0)
    actual = sampler.sample(params, Condition(jnp.asarray(labels)), key, shape)
    x = torch.tensor(np.array(sampler._initial(key, 2, shape, 0).x_BhwC).transpose(0, 3, 1, 2).copy())
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(8)
    classes = torch.tensor([*labels, 10, 10]).long()
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = folders.reference()(torch.cat([x, x]), t.expand(4), classes).sample[:, :4]
            with_label, without = output.chunk(2)
            x = scheduler.step(without + 4.0 * (with_label - without), t, x).prev_sample
    expected = x.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


def test_a_pipelines_folder_is_read_and_written_whole(tmp_path):
    source, denoiser, params = loaded(folders.pipeline(tmp_path / "in"))
    convert.convert(source, tmp_path / "out")
    files = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()}
    kept = {path.relative_to(tmp_path / "in") for path in (tmp_path / "in").rglob("*") if path.suffix != ".py"}
    assert files == {path for path in kept if path.suffix}
    for file in files - {f for f in files if f.parts[0] == "transformer"}:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "in" / file).read_bytes()
    assert (tmp_path / "out" / "transformer" / WEIGHTS).read_bytes() == (folders.saved() / WEIGHTS).read_bytes()
    assert convert.open_source(tmp_path / "out").model == source.model


def test_loading_onto_eight_devices():
    source, denoiser, params = loaded(folders.saved())
    mesh = sharding.make_mesh("fsdp=4, tensor=2")
    with jax.set_mesh(mesh):
        sharded = source.load(sharding.abstract_shards(model.abstract_params(denoiser), mesh), lm=denoiser)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(sharded))
    jax.tree.map(np.testing.assert_array_equal, sharded, params)
