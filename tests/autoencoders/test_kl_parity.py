"""AutoencoderKL against diffusers in float32, for every branch: each model is read from the folder it saved."""

import functools
import inspect
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from efficientllm.convert.hf_config.class_defaults import DIFFUSERS
from efficientllm.registry import build

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.xdist_group("diffusers")

TOLERANCE = 2e-5  # float32 against float64 of the same torch model: 2.4e-6 on values of 1 to 2.8
PLAIN = {"block_out_channels": (8, 16), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4}
BRANCHES = {
    "quant": {},
    "no-quant": {
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "latent_channels": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
    },
    "quant-alone": {"use_post_quant_conv": False},
    "no-attention": {"mid_block_add_attention": False},
    "deeper": {"block_out_channels": (8, 8, 16, 12), "layers_per_block": 2},
    "one-level": {"block_out_channels": (8,)},
}


@functools.cache
def saved(branch):
    """`(model, folder)`: a random model of diffusers, every parameter of it jittered, and where it is saved."""
    changes = PLAIN | BRANCHES[branch]
    levels = len(changes["block_out_channels"])
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(**changes, **blocks)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    folder = tempfile.mkdtemp()
    model.eval().save_pretrained(folder)
    return model, folder


def images():
    return np.random.default_rng(0).normal(size=(2, 16, 24, 3)).astype(np.float32)


def channels_first(x):
    return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2).copy())


def channels_last(x):
    return x.numpy().transpose(0, 2, 3, 1)


def scaled(model, z):
    return (z - (model.config.shift_factor or 0)) * model.config.scaling_factor


@pytest.mark.parametrize("branch", BRANCHES)
def test_latents_are_those_of_diffusers(branch):
    model, folder = saved(branch)
    autoencoder = build("autoencoder", f"kl(path={folder!r})")
    with torch.no_grad():
        posterior = model.encode(channels_first(images())).latent_dist
    mean = channels_last(scaled(model, posterior.mean))
    assert mean.shape[1:] == autoencoder.latent_shape((16, 24, 3))
    np.testing.assert_allclose(autoencoder.encode(images()), mean, atol=TOLERANCE)
    key = jax.random.key(3)
    noise = channels_first(jax.random.normal(key, mean.shape))
    sample = channels_last(scaled(model, posterior.mean + posterior.std * noise))
    assert np.abs(sample - mean).max() > 0.1  # the noise is no rounding error
    np.testing.assert_allclose(autoencoder.encode(images(), key), sample, atol=TOLERANCE)


@pytest.mark.parametrize("branch", BRANCHES)
def test_images_are_those_of_diffusers(branch):
    model, folder = saved(branch)
    autoencoder = build("autoencoder", f"kl(path={folder!r})")
    shape = (2, *autoencoder.latent_shape((16, 24, 3)))
    latents = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    unscaled = channels_first(latents) / model.config.scaling_factor + (model.config.shift_factor or 0)
    with torch.no_grad():
        expected = channels_last(model.decode(unscaled).sample)
    np.testing.assert_allclose(autoencoder.decode(latents), expected, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "mixed"])
def test_bfloat16_products_round(precision):
    """Operands have a relative error of 2^-9; some twenty products one after another stay within 2^-4 of the whole."""
    _, folder = saved("deeper")
    exact, rounded = (build("autoencoder", f"kl(path={folder!r}, precision={p!r})") for p in ("float32", precision))
    latents = exact.encode(images())
    for a, b in ((latents, rounded.encode(images())), (exact.decode(latents), rounded.decode(latents))):
        assert b.dtype == jnp.float32
        error = float(jnp.abs(a - b).max() / jnp.abs(a).max())
        assert 2**-14 < error < 2**-4


def test_older_names_of_the_attention(tmp_path):
    """diffusers before 0.17 wrote query, key, value and proj_attn."""
    _, folder = saved("quant")
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = load_file(f"{folder}/diffusion_pytorch_model.safetensors")
    for new, old in older.items():
        renamed = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): t for name, t in renamed.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in renamed
    save_file(renamed, tmp_path / "diffusion_pytorch_model.safetensors")
    shutil.copy(f"{folder}/config.json", tmp_path)
    params = build("autoencoder", f"kl(path={str(tmp_path)!r})").params
    jax.tree.map(np.testing.assert_array_equal, params, build("autoencoder", f"kl(path={folder!r})").params)


def test_missing_keys_have_the_defaults_of_diffusers():
    signature = inspect.signature(diffusers.AutoencoderKL.__init__)
    defaults = {key: field.default for key, field in signature.parameters.items()}
    known = {
        key: tuple(value) if isinstance(value, list) else value for key, value in DIFFUSERS["AutoencoderKL"].items()
    }
    assert known == {key: defaults[key] for key in known}
