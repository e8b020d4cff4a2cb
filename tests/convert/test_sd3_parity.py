"""Stable Diffusion 3 against diffusers in float32: predictions, gradients, a trajectory, and files of both layouts."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import sd3_folders as folders
from convert.sd3_folders import WEIGHTS, diffusers, torch
from efficientllm import convert, model
from efficientllm.convert import __main__ as command
from efficientllm.convert import check_denoiser, denoiser_source
from efficientllm.embeds.condition import Condition
from efficientllm.errors import UserError
from efficientllm.infer.denoise import DiffusionSampler
from efficientllm.registry import build

pytestmark = pytest.mark.xdist_group("diffusers")
TABLE = "pos_embed.pos_embed"  # which diffusers computes from coordinates in float32: up to 2.1e-6 beside


def loaded(folder):
    source = convert.open_source(folder)
    denoiser = source.lm()
    return source, denoiser, source.load(nn.unbox(model.abstract_params(denoiser)))


def predict(denoiser, params, *inputs):
    return np.asarray(jax.jit(denoiser.apply)({"params": params}, *inputs)[0])


def tensors_are_those(written, folder):
    actual, expected = load_file(written / WEIGHTS), load_file(folder / WEIGHTS)
    np.testing.assert_allclose(actual.pop(TABLE), expected.pop(TABLE), atol=2.1e-6)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("branch", folders.BRANCHES)
def test_predictions_of_diffusers_and_its_files_both_ways(branch, tmp_path):
    reference, folder = folders.reference(branch), folders.saved(branch)
    source, denoiser, params = loaded(folder)
    inputs = folders.inputs(reference)
    expected = check_denoiser.predict_with(reference, *inputs)
    np.testing.assert_allclose(predict(denoiser, params, *inputs), expected, atol=1e-5)
    convert.convert(source, tmp_path / "converted")
    convert.export(denoiser, params, tmp_path / "exported", "SD3Transformer2DModel")  # the config.json too is ours
    for written in (tmp_path / "converted", tmp_path / "exported"):
        tensors_are_those(written, folder)
        theirs = diffusers.SD3Transformer2DModel.from_pretrained(written).eval()
        np.testing.assert_allclose(check_denoiser.predict_with(theirs, *inputs), expected, atol=1e-5)


@pytest.mark.parametrize("branch", ("dual", "sd3.0"))
def test_a_single_file_is_read(branch, tmp_path):
    """Without a config.json; heads are then of 64 numbers, so one is written to the tiny model's folder."""
    folder = folders.save_single_file(tmp_path / "single", branch)
    assert denoiser_source.published_config(folder)["dual_attention_layers"] == ([0] if branch == "dual" else [])
    config = json.loads((folders.saved(branch) / "config.json").read_text()) | {"_class_name": "SD3"}
    (folder / "config.json").write_text(json.dumps(config))
    _, denoiser, params = loaded(folder)
    _, same, expected = loaded(folders.saved(branch))
    assert denoiser == same
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    convert.convert(convert.open_source(folder), tmp_path / "again")
    actual, tensors = load_file(tmp_path / "again" / "model.safetensors"), load_file(folder / "sd3.safetensors")
    assert tensors.keys() - actual.keys() == {"first_stage_model.encoder.conv_in.bias"}
    for name in actual.keys() - {"model.diffusion_model.pos_embed"}:
        np.testing.assert_array_equal(actual[name], tensors[name])


@pytest.mark.slow
def test_gradients_of_all_parameters_and_inputs():
    folder, reference = folders.saved(), folders.reference()
    _, denoiser, params = loaded(folder)
    x, levels, condition = folders.inputs(reference)
    direction = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

    def loss(params, x, text, pooled):
        prediction, _ = denoiser.apply({"params": params}, x, levels, Condition(text_BSE=text, pooled_BE=pooled))
        return jnp.sum(prediction * direction)

    actual = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(params, x, condition.text_BSE, condition.pooled_BE)
    reference.zero_grad()
    images, text, pooled = (
        torch.tensor(array.copy(), requires_grad=True)
        for array in (np.moveaxis(x, -1, 1), condition.text_BSE, condition.pooled_BE)
    )
    prediction = reference(images, text, pooled, torch.tensor(levels)).sample
    (prediction * torch.tensor(np.moveaxis(direction, -1, 1).copy())).sum().backward()
    named = dict(reference.named_parameters())
    gradients = {
        name: np.zeros(parameter.shape, np.float32) if parameter.grad is None else parameter.grad.numpy()
        for name, parameter in named.items()
    }
    expected = (read_as_parameters(denoiser, gradients), np.moveaxis(images.grad.numpy(), 1, -1), text.grad.numpy())
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))

    def close(actual, expected):  # that of a key's bias is 0 but for rounding: a softmax does not see it
        assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max() + 1e-7 * largest

    jax.tree.map(close, actual, (*expected, pooled.grad.numpy()))


def read_as_parameters(denoiser, tensors):
    """The tree of parameters whose tensors have these names and values."""
    import flax.traverse_util

    from efficientllm.convert.hf_config import families
    from efficientllm.convert.tensors import parameter_map

    class Tensors:
        read = staticmethod(tensors.__getitem__)

    leaves = parameter_map.bind_parameters(denoiser, families.DENOISERS["SD3Transformer2DModel"].table)
    read = {path: leaf.read(Tensors, (slice(None),) * len(leaf.shape), np.float32) for path, leaf in leaves.items()}
    return flax.traverse_util.unflatten_dict(read, sep="/")


def test_a_trajectory_of_eight_steps_with_a_negative_prompt():
    """As diffusers' pipeline runs it: its list of sigmas, which is shifted twice at the end, and guidance 7."""
    reference = folders.reference()
    source, denoiser, params = loaded(folders.saved())
    _, _, condition = folders.inputs(reference)
    negative = jax.tree.map(lambda leaf: -0.5 * leaf[::-1], condition)
    solver, key, shape = build("solver", "euler(steps=8, levels='sd3')"), jax.random.key(2), (8, 12, 4)
    sampler = DiffusionSampler(denoiser, build("objective", source.objective()), solver, 7.0)
    x = torch.tensor(np.moveaxis(np.array(sampler.begin(2, key, shape).x_BhwC), -1, 1).copy())
    actual = sampler.sample(params, condition, key, shape, negative=negative)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    text, pooled = (
        torch.tensor(np.concatenate([getattr(negative, field), getattr(condition, field)]))
        for field in ("text_BSE", "pooled_BE")
    )
    with torch.no_grad():
        for t in scheduler.timesteps:
            without, prompted = reference(torch.cat([x, x]), text, pooled, t.expand(4)).sample.chunk(2)
            x = scheduler.step(without + 7.0 * (prompted - without), t, x).prev_sample
    expected = np.moveaxis(x.numpy(), 1, -1)
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


def test_a_pipelines_folder_says_its_shift(tmp_path):
    source, _, _ = loaded(folders.pipeline(tmp_path / "in"))
    assert source.objective() == "flow(shift=2.5, label_dropout=0.0)"
    convert.convert(source, tmp_path / "out")
    tensors_are_those(tmp_path / "out" / "transformer", folders.saved())
    assert convert.open_source(tmp_path / "out").objective() == source.objective()


def test_the_command_compares_with_diffusers(capsys):
    assert command.main(["check", str(folders.saved())]) == 0
    assert "max difference" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_layers": None}, "key 'num_layers' is missing"),
        ({"qk_norm": "layer_norm"}, "known is 'rms_norm', or none"),
        ({"caption_projection_dim": 32}, "the streams of patches and text are of one width, 24"),
        ({"dual_attention_layers": [3]}, "there are layers 0 to 2"),
        ({"pos_embed_max_size": 3}, "table = 3 holds no grid of 4 x 4"),
    ],
)
def test_configs_that_are_refused(changes, message, tmp_path):
    config = json.loads((folders.saved() / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )
    with pytest.raises(UserError, match=message):
        source = convert.open_source(tmp_path, weights=False)
        model.abstract_params(source.lm())
