"""AutoencoderKL: its size and cost, one device against eight, and folders that are refused."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autoencoders import folders
from autoencoders.folders import STABLE_DIFFUSION, STABLE_DIFFUSION_3, TINY
from efficientllm import sharding
from efficientllm.autoencoders import kl, kl_network
from efficientllm.autoencoders.kl_network import Decoder, Encoder
from efficientllm.cost.jaxpr_flops import count_matmul_flops
from efficientllm.errors import UserError
from efficientllm.registry import build

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("shape, count", [(STABLE_DIFFUSION, 83_653_863), (STABLE_DIFFUSION_3, 83_819_683)])
def test_published_sizes(shape, count):
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(kl.abstract_params(shape))) == count


@pytest.mark.parametrize(
    "shape, side, decode, encode", [(STABLE_DIFFUSION, 256, 0.62, 0.27), (STABLE_DIFFUSION_3, 1024, 10.47, 4.88)]
)
def test_flops(shape, side, decode, encode):
    params = kl.abstract_params(shape)
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    latents = jax.ShapeDtypeStruct((1, side // 8, side // 8, shape.latent_channels), jnp.float32)
    flops_by_half = (
        count_matmul_flops(module.apply, {"params": params[name]}, x)
        for name, module, x in (("decoder", Decoder(shape), latents), ("encoder", Encoder(shape), images))
    )
    assert [round(flops / 1e12, 2) for flops in flops_by_half] == [decode, encode]


@pytest.mark.parametrize("scores", [2**22, 17 * 40, 1])
def test_attention_in_chunks(scores, monkeypatch):
    """Of all queries, of 17 of the 40 at a time, and of one."""
    monkeypatch.setattr(kl_network, "SCORES", scores)
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 40, 8)).astype(np.float32)
    weights = jax.nn.softmax(np.einsum("btc,bsc->bts", q, k) / 8**0.5)
    np.testing.assert_allclose(kl_network.attend(q, k, v), np.einsum("bts,bsc->btc", weights, v), atol=1e-6)


def test_a_pipelines_folder_holds_its_autoencoder_in_vae(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    folder = folders.save(tmp_path / "vae")
    a, b = (build("autoencoder", f"kl(path={str(path)!r})") for path in (tmp_path, folder))
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


def test_parameters_are_replicated_and_rows_sharded(tmp_path):
    spec = f"kl(path={str(folders.save(tmp_path))!r})"
    images = np.random.default_rng(0).normal(size=(8, 8, 16, 3)).astype(np.float32)
    alone = build("autoencoder", spec)
    latents = alone.encode(images, jax.random.key(0))
    decoded = alone.decode(latents)
    mesh = sharding.make_mesh("data=4, fsdp=2")
    with jax.set_mesh(mesh):
        autoencoder = build("autoencoder", spec)
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(autoencoder.params))
        sharded = autoencoder.encode(images, jax.random.key(0))
        assert sharded.sharding.shard_shape(sharded.shape)[0] == 1
        np.testing.assert_allclose(sharded, latents, atol=1e-5)
        np.testing.assert_allclose(autoencoder.decode(sharded), decoded, atol=1e-5)
        np.testing.assert_allclose(alone.decode(sharded), decoded, atol=1e-5)  # its parameters were on one device
    np.testing.assert_allclose(autoencoder.decode(latents), decoded, atol=1e-5)


def test_a_posterior_can_be_kept_and_sampled_later(tmp_path):
    autoencoder = build("autoencoder", f"kl(path={str(folders.save(tmp_path))!r})")
    images = np.random.default_rng(0).normal(size=(2, 8, 16, 3)).astype(np.float32)
    mean, logvar = autoencoder.posterior(images)
    for key in (None, jax.random.key(5)):
        np.testing.assert_allclose(autoencoder.sample(mean, logvar, key), autoencoder.encode(images, key), atol=1e-6)


def test_the_fingerprint_changes_with_what_changes_a_posterior(tmp_path):
    def fingerprint(folder, fields="", **changes):
        return build(
            "autoencoder", f"kl(path={str(folders.save(tmp_path / folder, **changes))!r}{fields})"
        ).fingerprint()

    plain = fingerprint("a")
    assert fingerprint("b") == plain  # the same elsewhere
    moved = folders.tensors()[NAME] + 1e-6
    others = [
        fingerprint("c", **{NAME: moved}),
        fingerprint("d", config=TINY | {"scaling_factor": 0.5}),
        *(fingerprint("e", fields) for fields in (", precision='bfloat16'", ", tile=8", ", tile=8, sweeps=2")),
    ]
    assert len({plain, *others}) == 6


def test_pixels_are_their_own_latents():
    pixels = build("autoencoder", "pixels")
    images = np.random.default_rng(0).normal(size=(2, 5, 7, 1)).astype(np.float32)
    assert pixels.latent_shape((5, 7, 1)) == (5, 7, 1) and pixels.params == {}
    np.testing.assert_array_equal(pixels.decode(pixels.encode(images, jax.random.key(0))), images)
    np.testing.assert_array_equal(pixels.sample(*pixels.posterior(images), jax.random.key(0)), images)
    pixels.check_channels(1)


NAME = "encoder.conv_in.weight"
HALF = np.zeros((8, 3, 3), np.float32)


@pytest.mark.parametrize(
    "config, tensors, message",
    [
        ({"_class_name": "AutoencoderTiny"}, {}, "_class_name = 'AutoencoderTiny': is not AutoencoderKL"),
        ({"_class_name": None}, {}, "_class_name = None: is not AutoencoderKL"),
        ({"block_out_channels": [8, 15]}, {}, "norm_num_groups = 4 does not divide block_out_channels = 15"),
        ({"block_out_channels": []}, {}, r"block_out_channels = \[\]: must be widths of 1 to 8 levels"),
        ({"block_out_channels": [8] * 99}, {}, "must be widths of 1 to 8 levels"),
        ({"layers_per_block": 10**9}, {}, "layers_per_block = 1000000000: must be at most 64"),
        ({"layers_per_block": 1.5}, {}, "layers_per_block = 1.5 must be a positive int"),
        ({"latent_channels": True}, {}, "latent_channels = True must be a positive int"),
        ({"use_quant_conv": "yes"}, {}, "use_quant_conv = 'yes': must be true or false"),
        ({"shift_factor": "1"}, {}, "shift_factor = '1': must be a number"),
        ({"act_fn": "relu"}, {}, 'act_fn = "relu" is not supported'),
        ({"latents_mean": [0.0]}, {}, "latents_mean = .* is not supported"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, {}, "down_block_types = .* is not supported"),
        ({"norm_type": "spatial"}, {}, 'norm_type = "spatial" is not supported'),
        ({}, {NAME: None}, f"tensor '{NAME}' of shape .* is missing"),
        ({}, {"encoder.conv_in.extra": HALF}, "'encoder.conv_in.extra' belongs to nothing"),
        ({}, {NAME: HALF}, rf"'{NAME}' has shape \[8, 3, 3\], the config asks for \[8, 3, 3, 3\]"),
    ],
)
def test_folders_that_are_refused(tmp_path, config, tensors, message):
    folders.save(tmp_path, **tensors)
    (tmp_path / "config.json").write_text(json.dumps(TINY | config))
    with pytest.raises(UserError, match=message) as refused:
        build("autoencoder", f"kl(path={str(tmp_path)!r})").load_params()
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


def test_paths_that_are_refused(tmp_path):
    with pytest.raises(UserError, match="path = '.*none': no folder"):
        build("autoencoder", f"kl(path={str(tmp_path / 'none')!r})")
    with pytest.raises(UserError, match="config.json is missing"):
        build("autoencoder", f"kl(path={str(tmp_path)!r})")
    with pytest.raises(UserError, match="needs a value for path"):
        build("autoencoder", "kl()")


def test_images_and_latents_that_are_refused(tmp_path):
    autoencoder = build("autoencoder", f"kl(path={str(folders.save(tmp_path))!r})")
    with pytest.raises(UserError, match=r"17 x 24 pixels: .* multiples of 2; crop or resize them to 16 x 24"):
        autoencoder.encode(np.zeros((1, 17, 24, 3), np.float32))
    with pytest.raises(UserError, match="images of 4 channels: the autoencoder takes 3"):
        autoencoder.encode(np.zeros((1, 16, 24, 4), np.float32))
    with pytest.raises(UserError, match="latents of 16 channels: the autoencoder has 4; let the model have 4"):
        autoencoder.decode(np.zeros((1, 8, 8, 16), np.float32))
