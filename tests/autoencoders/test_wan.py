"""AutoencoderKLWan: its size, cost and memory, in chunks, in tiles and on eight devices, and what is refused."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autoencoders import wan_folders
from autoencoders.wan_folders import NAME, TINIER, TINY
from efficientllm import sharding
from efficientllm.autoencoders import tiles, wan
from efficientllm.autoencoders.wan_network import Decoder, Encoder, WanShape
from efficientllm.cost.jaxpr_flops import count_matmul_flops
from efficientllm.errors import UserError
from efficientllm.registry import build
from tiers import slow_case

pytestmark = pytest.mark.quick
PUBLISHED = WanShape()
# Two sums of n terms in another order differ by n eps / 2 of the sum of magnitudes at most, by about sqrt(n) eps as a
# random walk; n is 27 x 8 here, and errors of some thirty layers add up: 30 x 15 x 6e-8.
REORDERED = 3e-5


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    return build("autoencoder", f"wan(path={str(wan_folders.save(tmp_path_factory.mktemp('vae')))!r})")


@pytest.fixture(scope="module")
def tinier(tmp_path_factory):
    return build("autoencoder", f"wan(path={str(wan_folders.save(tmp_path_factory.mktemp('vae'), TINIER))!r})")


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_published_size():
    params = wan.abstract_params(PUBLISHED)
    counts = [sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params[half])) for half in params]
    assert sum(counts) == 126_892_531 and [round(count / 1e6, 1) for count in counts] == [53.6, 73.3]


def test_flops_of_81_frames_of_480p():
    """Whole, and in chunks: `published` is what Wan's network has, 275 and 164 TFLOP."""
    params = wan.abstract_params(PUBLISHED)
    clips = jax.ShapeDtypeStruct((1, 81, 480, 832, 3), jnp.float32)
    latents = jax.ShapeDtypeStruct((1, 21, 60, 104, 16), jnp.float32)
    for module, half, x, published in (
        (Decoder(PUBLISHED), "decoder", latents, 275e12),
        (Encoder(PUBLISHED), "encoder", clips, 164e12),
    ):
        assert count_matmul_flops(module.apply, {"params": params[half]}, x) == pytest.approx(published, rel=0.01)


def test_chunks_have_the_flops_of_the_whole(tinier):
    latents, params = jax.ShapeDtypeStruct((1, 6, 2, 3, 4), jnp.float32), tinier.abstract_params()
    flops = [count_matmul_flops(dataclasses.replace(tinier, chunk=n).decode_with, params, latents) for n in (0, 2)]
    assert flops[0] == flops[1] > 0


@pytest.mark.slow
def test_chunks_have_the_numbers_of_the_whole(autoencoder):
    """5 latent frames after the first, of which 2 is no divisor."""
    whole, chunks = (dataclasses.replace(autoencoder, chunk=size) for size in (0, 2))
    clips, latents = draw(1, 11, 8, 12, 3), draw(1, 6, 2, 3, 4)
    for a, b in ((whole.encode(clips), chunks.encode(clips)), (whole.decode(latents), chunks.decode(latents))):
        assert a.shape == b.shape and float(jnp.abs(a).std()) > 0.1
        np.testing.assert_allclose(b, a, atol=REORDERED)


def test_frames_depend_on_those_before_alone(autoencoder):
    """The first of six latent frames is decoded to one frame, each further to two."""
    latents = draw(1, 6, 2, 3, 4)
    changed = latents.copy()
    changed[:, 3] += 1
    difference = np.abs(autoencoder.decode(changed) - autoencoder.decode(latents)).max((0, 2, 3, 4))
    assert difference.shape == (11,) and (difference[:5] == 0).all() and (difference[5:7] > 1e-3).all()


@pytest.mark.parametrize("method", ["decode_with", slow_case("posterior_with")])
def test_the_peak_is_bounded_by_a_chunk(tinier, method):
    """Four times the frames take the memory of the clip and its latents, and no more."""

    def temporary(autoencoder, frames):
        x = {"decode_with": (1, (1 + frames) // 2, 32, 32, 4), "posterior_with": (1, frames, 64, 64, 3)}[method]
        program = jax.jit(getattr(autoencoder, method))
        compiled = program.lower(autoencoder.abstract_params(), jax.ShapeDtypeStruct(x, jnp.float32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = (temporary(tinier, frames) for frames in (9, 33))
    assert long - short <= 4 * (33 - 9) * 64 * 64 * 3
    assert temporary(dataclasses.replace(tinier, chunk=0), 33) > 3 * long


@pytest.mark.parametrize("direction", [slow_case("encode"), "decode"])
def test_tiles_are_exact(autoencoder, direction):
    """Sides of which the tile is no divisor: the last tile overlaps the one before."""
    halo = {"encode": tiles.encoder_halo, "decode": tiles.decoder_halo}[direction](4, 1)
    height, width = 2 * halo + 5, 2 * halo + 6
    x = draw(1, 3, 4 * height, 4 * width, 3) if direction == "encode" else draw(1, 2, height, width, 4)
    tiled, whole = (getattr(dataclasses.replace(autoencoder, tile=tile), direction)(x) for tile in (4, 0))
    np.testing.assert_allclose(tiled, whole, atol=REORDERED)


def test_parameters_are_replicated_and_rows_sharded(tinier):
    latents = draw(8, 2, 3, 4, 4)
    decoded = tinier.decode(latents)
    with jax.set_mesh(sharding.make_mesh("data=4, fsdp=2")):
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(tinier.params))
        sharded = tinier.decode(latents)
        assert sharded.sharding.shard_shape(sharded.shape)[0] == 1
        np.testing.assert_allclose(sharded, decoded, atol=REORDERED)


def test_the_fingerprint_changes_with_what_changes_a_posterior(tmp_path):
    def fingerprint(folder, fields="", **changes):
        folder = wan_folders.save(tmp_path / folder, **changes)
        return build("autoencoder", f"wan(path={str(folder)!r}{fields})").fingerprint()

    plain = fingerprint("a")
    assert fingerprint("b") == plain  # the same elsewhere
    others = [
        fingerprint("c", **{NAME: wan_folders.tensors()[NAME] + 1e-6}),
        fingerprint("d", config=TINY | {"latents_std": [1.0, 2.0, 3.0, 5.0]}),
        *(fingerprint("e", fields) for fields in (", precision='bfloat16'", ", chunk=2", ", tile=8")),
    ]
    assert len({plain, *others}) == 6


@pytest.mark.parametrize(
    "config, tensors, message",
    [
        ({"_class_name": "AutoencoderKL"}, {}, "_class_name = 'AutoencoderKL': is not AutoencoderKLWan"),
        ({"dim_mult": []}, {}, r"dim_mult = \[\]: must be whole multiples of base_dim, of 1 to 8 levels"),
        ({"dim_mult": [1, 2]}, {}, "temperal_downsample = .*: must be a list of 1 times true or false"),
        ({"temperal_downsample": [0, 1]}, {}, "temperal_downsample = .*: must be a list of 2 times true or false"),
        ({"base_dim": 3, "dim_mult": [1, 1, 1]}, {}, "a level of 3 channels: must be even"),
        ({"base_dim": 60000}, {}, "a level of 120,000 channels: must be at most 65,536"),
        ({"num_res_blocks": 65}, {}, "num_res_blocks = 65: must be at most 64"),
        ({"latents_mean": [0.0]}, {}, r"latents_mean = \[0.0\]: must be a list of 4 numbers"),
        ({"latents_std": [1.0, 1.0, 0.0, 1.0]}, {}, "latents_std = .*: must be a list of 4 positive numbers"),
        ({"attn_scales": [0.5]}, {}, r"attn_scales = \[0.5\] is not supported"),
        ({"is_residual": True}, {}, "is_residual = true is not supported: levels of Wan 2.2"),
        ({"patch_size": 2}, {}, "patch_size = 2 is not supported"),
        ({"layer_scale": 3}, {}, "layer_scale = 3 is not supported"),
        ({}, {NAME: None}, f"tensor '{NAME}' of shape .* is missing"),
        ({}, {NAME: np.zeros((4, 3, 3, 3), np.float32)}, r"has shape \[4, 3, 3, 3\], .* asks for \[4, 3, 3, 3, 3\]"),
    ],
)
def test_folders_that_are_refused(tmp_path, config, tensors, message):
    wan_folders.save(tmp_path, **tensors)
    (tmp_path / "config.json").write_text(json.dumps(TINY | config))
    with pytest.raises(UserError, match=message) as refused:
        build("autoencoder", f"wan(path={str(tmp_path)!r})").load_params()
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("frames, message", [(2, "take 1 or 3"), (16, "take 15 or 17"), (0, "take 1 or 3")])
def test_frames_that_are_refused(autoencoder, frames, message):
    with pytest.raises(UserError, match=f"clips of {frames} frames: .* 1 more than a multiple of 2; {message}"):
        autoencoder.encode(np.zeros((1, frames, 16, 24, 3), np.float32))


def test_clips_and_latents_that_are_refused(autoencoder):
    with pytest.raises(UserError, match=r"17 x 24 pixels: .* multiples of 4; crop or resize them to 16 x 24"):
        autoencoder.encode(np.zeros((1, 5, 17, 24, 3), np.float32))
    with pytest.raises(UserError, match="latents of 16 channels: the autoencoder has 4; let the model have 4"):
        autoencoder.decode(np.zeros((1, 2, 8, 8, 16), np.float32))


def test_an_autoencoder_of_pictures_refuses_clips(tmp_path):
    from autoencoders import folders

    pictures = build("autoencoder", f"kl(path={str(folders.save(tmp_path))!r})")
    with pytest.raises(UserError, match="clips of 5 frames: the autoencoder takes pictures; take one of clips"):
        pictures.encode(np.zeros((1, 5, 16, 24, 3), np.float32))
    assert build("autoencoder", "pixels").latent_shape((5, 7, 9, 1)) == (5, 7, 9, 1)
