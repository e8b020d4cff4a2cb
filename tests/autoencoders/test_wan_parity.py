"""AutoencoderKLWan against diffusers in float32, with its caches: each model is read from the folder it saved."""

import functools
import inspect
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from efficientllm.convert.hf_config.class_defaults import DIFFUSERS
from efficientllm.registry import build
from tiers import slow_case, slow_except

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.xdist_group("diffusers")

TOLERANCE = 2e-5  # float32 against float64 of the same torch model: 3.6e-6 on values of 1 to 2.8
PLAIN = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 2, 2, 2],
    "num_res_blocks": 1,
    "latents_mean": [0.1, -0.2, 0.3, 0.5],
    "latents_std": [1.1, 0.7, 2.0, 1.6],
}
BRANCHES = {
    "plain": {},
    "other-decoder": {"decoder_base_dim": 6, "dim_mult": [1, 3, 2, 2], "num_res_blocks": 2},
    "two-levels": {"dim_mult": [1, 2], "temperal_downsample": [True]},
}
FRAMES = {"plain": 13, "other-decoder": 9, "two-levels": 5}


@functools.cache
def saved(branch):
    """`(model, folder)`: a random model of diffusers, every parameter of it jittered, and where it is saved."""
    torch.manual_seed(0)
    model = diffusers.AutoencoderKLWan(**PLAIN | BRANCHES[branch])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    folder = tempfile.mkdtemp()
    model.eval().save_pretrained(folder)
    return model, folder


def clips(frames):
    return np.random.default_rng(0).normal(size=(2, frames, 16, 24, 3)).astype(np.float32)


def channels_first(x):
    return torch.tensor(np.moveaxis(np.asarray(x), -1, 1).copy())


def channels_last(x):
    return np.moveaxis(x.numpy(), 1, -1)


def scaled(model, z):
    """As WanPipeline and its kin scale them."""
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (model.config.latents_mean, model.config.latents_std))
    return (z - mean) / std


@pytest.mark.parametrize("branch", slow_except(BRANCHES, "plain"))
def test_latents_are_those_of_diffusers(branch):
    model, folder = saved(branch)
    autoencoder, x = build("autoencoder", f"wan(path={folder!r})"), clips(FRAMES[branch])
    with torch.no_grad():
        posterior = model.encode(channels_first(x)).latent_dist
    mean = channels_last(scaled(model, posterior.mean))
    assert mean.shape[1:] == autoencoder.latent_shape(x.shape[1:])
    np.testing.assert_allclose(autoencoder.encode(x), mean, atol=TOLERANCE)
    key = jax.random.key(3)
    noise = channels_first(jax.random.normal(key, mean.shape))
    sample = channels_last(scaled(model, posterior.mean + posterior.std * noise))
    assert np.abs(sample - mean).max() > 0.1  # the noise is no rounding error
    np.testing.assert_allclose(autoencoder.encode(x, key), sample, atol=TOLERANCE)


@pytest.mark.parametrize("branch", slow_except(BRANCHES, "plain"))
def test_clips_are_those_of_diffusers(branch):
    model, folder = saved(branch)
    autoencoder = build("autoencoder", f"wan(path={folder!r})")
    shape = (2, *autoencoder.latent_shape((FRAMES[branch], 16, 24, 3)))
    latents = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    mean, std = (np.asarray(x, np.float32) for x in (model.config.latents_mean, model.config.latents_std))
    with torch.no_grad():
        expected = channels_last(model.decode(channels_first(latents * std + mean)).sample)
    assert expected.shape[1] == FRAMES[branch] and np.abs(expected).max() == 1 > np.abs(expected).mean() > 0.1
    np.testing.assert_allclose(autoencoder.decode(latents), expected, atol=TOLERANCE)


def test_a_picture_is_a_clip_of_one_frame():
    model, folder = saved("plain")
    autoencoder, x = build("autoencoder", f"wan(path={folder!r})"), clips(1)
    with torch.no_grad():
        expected = channels_last(scaled(model, model.encode(channels_first(x)).latent_dist.mean))
        decoded = channels_last(model.decode(model.encode(channels_first(x)).latent_dist.mean).sample)
    latents = autoencoder.encode(x[:, 0])
    np.testing.assert_allclose(latents, expected[:, 0], atol=TOLERANCE)
    np.testing.assert_allclose(autoencoder.decode(latents), decoded[:, 0], atol=TOLERANCE)


def test_what_is_written_is_what_diffusers_wrote(tmp_path):
    model, folder = saved("other-decoder")
    autoencoder = build("autoencoder", f"wan(path={folder!r})")
    autoencoder.write(tmp_path / "new")
    written, expected = (load_file(f"{x}/diffusion_pytorch_model.safetensors") for x in (tmp_path / "new", folder))
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(written[name], tensor, strict=True)
    moved = jax.tree.map(lambda leaf: leaf * 1.5, autoencoder.params)
    autoencoder.write(tmp_path / "moved", moved)
    loaded = diffusers.AutoencoderKLWan.from_pretrained(tmp_path / "moved").state_dict()
    assert all(torch.equal(loaded[name], 1.5 * tensor) for name, tensor in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", slow_case("mixed")])
def test_bfloat16_products_round_about_as_much_as_those_of_diffusers(precision):
    """By the root mean square; of four channels, norms amplify what is rounded before them."""
    model, folder = saved("plain")
    exact, rounded = (build("autoencoder", f"wan(path={folder!r}, precision={p!r})") for p in ("float32", precision))
    latents, decoded = encoded_and_decoded_in_bfloat16()
    for a, b, c in (
        (exact.encode(clips(5)), rounded.encode(clips(5)), latents),
        (exact.decode(latents), rounded.decode(latents), decoded),
    ):
        assert b.dtype == jnp.float32
        ours, theirs = (float(jnp.mean((a - x) ** 2) ** 0.5) for x in (b, c))
        # A bit less of precision would double it; sums are in an order of the CPU's own. "mixed" rounds operands alone,
        # which is a half of what diffusers rounds, so that it may have a bit more.
        least = theirs / (2 if precision == "bfloat16" else 4)
        assert ours > 2**-14 and least < ours < 2 * theirs


@functools.cache
def encoded_and_decoded_in_bfloat16():
    """Scaled latents of `clips(5)`, and these decoded, as diffusers computes them in bfloat16."""
    model, folder = saved("plain")
    half = diffusers.AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.bfloat16)
    with torch.no_grad():
        z = half.encode(channels_first(clips(5)).to(torch.bfloat16)).latent_dist.mean
        decoded = half.decode(z).sample
    return channels_last(scaled(model, z.float())), channels_last(decoded.float())


def test_missing_keys_have_the_defaults_of_diffusers():
    signature = inspect.signature(diffusers.AutoencoderKLWan.__init__)
    defaults = {key: field.default for key, field in signature.parameters.items()}
    known = DIFFUSERS["AutoencoderKLWan"]
    assert known == {key: defaults[key] for key in known}
