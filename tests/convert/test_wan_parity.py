"""Wan against diffusers in float32: predictions, gradients, a trajectory, and files in both directions."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import denoiser_folders, wan_folders
from convert.denoiser_folders import WEIGHTS
from convert.peft.test_denoiser_adapters import written
from convert.wan_folders import diffusers, torch
from efficientllm import convert, model
from efficientllm.convert import check_denoiser
from efficientllm.convert.hf_config import wan
from efficientllm.embeds.condition import Condition
from efficientllm.errors import UserError
from efficientllm.infer.denoise import DiffusionSampler
from efficientllm.registry import build
from tiers import slow_case, slow_except

pytestmark = pytest.mark.xdist_group("diffusers")

SIZE = (3, 8, 12, 4)
BRANCHES = {"wide": {}, "narrow": {"attention_head_dim": 12, "eps": 1e-5, "patch_size": (1, 4, 4)}}


def loaded(folder):
    source = convert.open_source(folder)
    denoiser = source.lm()
    return source, denoiser, source.load(nn.unbox(model.abstract_params(denoiser)))


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def texts(rows, seed=1):
    """States of texts of 6 tokens, padded with zeros."""
    text = np.zeros((rows, wan.TEXT_LENGTH, wan_folders.TINY["text_dim"]), np.float32)
    text[:, :6] = noise(rows, 6, text.shape[-1], seed=seed)
    return text


def inputs(rows=2):
    return noise(rows, *SIZE), np.array([999.0, 37.0, 0.0], np.float32)[:rows], Condition(text_BSE=texts(rows))


def predict(denoiser, params, *inputs):
    return np.asarray(jax.jit(denoiser.apply)({"params": params}, *inputs)[0])


@pytest.mark.slow
@pytest.mark.parametrize("branch", slow_except(BRANCHES, "wide"))
def test_predictions_of_diffusers_and_files_byte_by_byte(branch, tmp_path):
    reference, folder = wan_folders.reference(**BRANCHES[branch]), wan_folders.saved(**BRANCHES[branch])
    source, denoiser, params = loaded(folder)
    expected = check_denoiser.predict_with(reference, *inputs())
    assert np.abs(expected).max() > 0.3
    np.testing.assert_allclose(predict(denoiser, params, *inputs()), expected, rtol=0, atol=1e-5)
    states = denoiser.request_states(params, inputs()[-1])  # keys and values of the texts, computed beforehand
    np.testing.assert_allclose(predict(denoiser, params, *inputs(), states), expected, rtol=0, atol=1e-5)
    convert.convert(source, tmp_path / "converted")
    convert.export(denoiser, params, tmp_path / "exported", wan.NAME)  # the config.json too is ours
    for folder_name in ("converted", "exported"):
        assert (tmp_path / folder_name / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
        theirs = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / folder_name).eval()
        np.testing.assert_array_equal(check_denoiser.predict_with(theirs, *inputs()), expected)


@pytest.mark.slow
def test_gradients(tmp_path):
    """Gradients of all parameters, read from a file of theirs as parameters are.

    The texts have no padding: its keys are alike, their gradients cancel, and torch's own are 6e-4 from float64.
    """
    folder, reference = wan_folders.saved(), wan_folders.reference()
    _, denoiser, params = loaded(folder)
    images, levels, _ = inputs()
    condition = Condition(text_BSE=noise(*texts(2).shape, seed=4))
    direction = noise(*images.shape, seed=2)

    def loss(params):
        return jnp.sum(denoiser.apply({"params": params}, images, levels, condition)[0] * direction)

    gradients = jax.jit(jax.grad(loss))(params)
    reference.zero_grad()
    x, y = (torch.tensor(np.moveaxis(array, -1, 1).copy()) for array in (images, direction))
    output = reference(x, torch.tensor(levels).long(), torch.tensor(condition.text_BSE)).sample
    (output * y).sum().backward()
    theirs = {name: parameter.grad.numpy().copy() for name, parameter in reference.named_parameters()}
    _, _, expected = loaded(denoiser_folders.edit(folder, tmp_path / "gradients", **theirs))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))

    def close(actual, expected):  # that of a key's bias is 0 but for rounding: a softmax does not see it
        assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max() + 1e-7 * largest

    jax.tree.map(close, gradients, expected)


@pytest.mark.parametrize("scan", [True, slow_case(False)])
def test_a_trajectory_of_eight_steps(scan, tmp_path):
    """UniPC with guidance away from a negative prompt, as diffusers' pipeline runs it."""
    source = convert.open_source(wan_folders.pipeline(tmp_path / "pipeline"))
    denoiser = source.lm(scan=scan)
    params = source.load(nn.unbox(model.abstract_params(denoiser)), lm=denoiser)
    prompts, negative, key = texts(2), texts(2, seed=3), jax.random.key(2)
    objective, solver = build("objective", source.objective()), build("solver", "unipc(steps=8)")
    sampler = DiffusionSampler(denoiser, objective, solver, 5.0)
    conditions = {"condition": Condition(text_BSE=prompts), "negative": Condition(text_BSE=negative)}
    actual = sampler.sample(params, key=key, shape=SIZE, **conditions)
    x = torch.tensor(np.moveaxis(np.array(sampler.begin(2, key, SIZE).x_BhwC), -1, 1).copy())
    scheduler = diffusers.UniPCMultistepScheduler.from_pretrained(tmp_path / "pipeline" / "scheduler")
    scheduler.set_timesteps(8)
    assert scheduler.timesteps.tolist() == sampler.rows["level"].tolist()
    with torch.no_grad():
        for t in scheduler.timesteps:
            wanted, unwanted = (
                wan_folders.reference()(x, t.expand(2), torch.tensor(text)).sample for text in (prompts, negative)
            )
            x = scheduler.step(unwanted + 5.0 * (wanted - unwanted), t, x).prev_sample
    expected = np.moveaxis(x.numpy(), 1, -1)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    "spec", ["lora(rank=3, alpha=5)", slow_case("lokr(rank=8, alpha=5)"), slow_case("glora(rank=3)")]
)
def test_an_adapter_that_peft_reads_and_so_do_we(spec, tmp_path):
    """A layer of theirs is two blocks here; self-attention, cross-attention and the ffn are tuned."""
    peft = pytest.importorskip("peft")
    source = convert.open_source(wan_folders.saved())
    denoiser, params = written(source, spec, tmp_path / "adapter")
    expected = predict(denoiser, params, *inputs())
    plain = diffusers.WanTransformer3DModel.from_pretrained(wan_folders.saved())
    tuned = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    assert len(tuned.peft_config["default"].target_modules) >= 6
    np.testing.assert_allclose(check_denoiser.predict_with(tuned, *inputs()), expected, rtol=0, atol=1e-5)
    _, denoiser, merged = loaded(tmp_path / "adapter")
    np.testing.assert_allclose(predict(denoiser, merged, *inputs()), expected, rtol=0, atol=1e-5)
    assert np.abs(expected - check_denoiser.predict_with(wan_folders.reference(), *inputs())).max() > 1e-2


def test_the_schedule_of_a_pipeline(tmp_path):
    source = convert.open_source(wan_folders.pipeline(tmp_path / "five", flow_shift=5.0))
    assert source.objective() == "flow(label_dropout=0.0, shift=5.0)"
    assert convert.open_source(wan_folders.saved()).objective() == "flow(label_dropout=0.0)"
    source = convert.open_source(wan_folders.pipeline(tmp_path / "noise", prediction_type="epsilon"))
    with pytest.raises(UserError, match='prediction_type = "epsilon" is not supported: flow predicts the velocity'):
        source.objective()


def test_the_command_compares_with_diffusers():
    differences = check_denoiser.compare_predictions(convert.open_source(wan_folders.saved()))
    assert differences["max_prediction"] > 0.3
    assert differences["max_difference"] < 1e-5


@pytest.mark.parametrize(
    "config, message",
    [
        ({"num_layers": 3}, "num_layers = 3 is not supported: .* must be even"),
        ({"patch_size": [2, 2, 2]}, r"patch_size = \[2, 2, 2\] is not supported: patches are squares of one frame"),
        ({"patch_size": [1, 2]}, r"patch_size = \[1, 2\] is not supported"),
        ({"patch_size": [1, True, 2]}, "patch_size = .*: must be a whole number"),
        ({"image_dim": 1280}, "image_dim = 1280 is not supported: .* known is text to video"),
        ({"cross_attn_norm": False}, "cross_attn_norm = false is not supported"),
        ({"qk_norm": "layer_norm"}, 'qk_norm = "layer_norm" is not supported'),
        ({"out_channels": 8}, "out_channels = 8 is not supported: in_channels = 4"),
        ({"ffn_dim": 48}, r"'blocks.0.ffn.net.2.weight' has shape \[32, 40\], the config asks for \[32, 48\]"),
    ],
)
def test_what_is_refused(config, message, tmp_path):
    folder = denoiser_folders.edit(wan_folders.saved(), tmp_path / "edited", config)
    with pytest.raises(UserError, match=message) as refused:
        loaded(folder)
    assert "\n" not in str(refused.value)


def test_clips_are_of_every_size_that_the_table_of_rotations_holds():
    _, denoiser, params = loaded(wan_folders.saved())
    apply = jax.eval_shape(denoiser.apply, {"params": params}, np.zeros((1, 32, 64, 4, 4)), *inputs(1)[1:])
    assert apply[0].shape == (1, 32, 64, 4, 4)
    with pytest.raises(UserError, match="position: table = 32: a token is at 32; give it at least 33"):
        jax.eval_shape(denoiser.apply, {"params": params}, np.zeros((1, 33, 8, 8, 4)), *inputs(1)[1:])


def test_a_written_config_is_theirs(tmp_path):
    source, denoiser, params = loaded(wan_folders.saved())
    convert.export(denoiser.clone(size=(5, 6, 8)), params, tmp_path / "written", wan.NAME)
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "written", wan_folders.saved()))
    assert ours == {key: value for key, value in theirs.items() if key in ours}
    assert set(theirs) - set(ours) <= {"_diffusers_version", "_name_or_path"}
