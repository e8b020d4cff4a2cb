"""Tiled encoding and decoding: what is exact, and what memory it takes."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autoencoders import folders
from autoencoders.folders import STABLE_DIFFUSION, TINY
from efficientllm.autoencoders import tiles
from efficientllm.autoencoders.convolutions import NormMoments
from efficientllm.autoencoders.kl_network import Decoder, Encoder
from efficientllm.registry import build
from tiers import slow_case

pytestmark = pytest.mark.quick
NORMS = {"decode": 2 * (2 * 2) + 1, "encode": 2 * (2 * 1)}  # outside the middle of TINY


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    return build("autoencoder", f"kl(path={str(folders.save(tmp_path_factory.mktemp('vae')))!r})")


def tiled(autoencoder, tile, sweeps):
    return dataclasses.replace(autoencoder, tile=tile, sweeps=sweeps)


def inputs(autoencoder, direction, height=24, width=34):
    zoom, channels = (1, 4) if direction == "decode" else (autoencoder.factor, 3)
    return np.random.default_rng(0).normal(size=(2, height * zoom, width * zoom, channels)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("direction, tile", [("decode", 5), slow_case("encode", 8)])
def test_tiles_are_exact_after_a_sweep_for_every_norm(autoencoder, direction, tile):
    """Sides of which the tile is no divisor: the last tile overlaps the one before."""
    x = inputs(autoencoder, direction)
    whole = getattr(autoencoder, direction)(x)
    differences = [
        float(jnp.abs(getattr(tiled(autoencoder, tile, sweeps), direction)(x) - whole).max())
        for sweeps in (0, 1, NORMS[direction])
    ]
    assert differences[0] > differences[1] > differences[2]
    assert differences[2] < 2e-5 and differences[1] > 1e-3


@pytest.mark.slow
def test_no_seams_after_one_sweep(autoencoder):
    """All tiles then have the same moments, and so are parts of one image: other tiles, the same result.

    The moments themselves come from tiles. So they are given here.
    """
    x = jnp.asarray(inputs(autoencoder, "decode")).repeat(16 // 4, -1)
    decoder = Decoder(autoencoder.shape)
    variables = {"params": autoencoder.params["decoder"]}
    tile = tiles.Tile(jnp.asarray([0, 24, 0, 34]), 24)
    _, collected = decoder.apply(variables, x, tile, method="up", mutable=["moments"])
    moved = jax.tree.map(
        lambda m: NormMoments(m.count, m.mean + 0.1, m.deviation * 1.3),
        collected["moments"],
        is_leaf=lambda leaf: isinstance(leaf, NormMoments),
    )
    expected = decoder.apply(variables | {"of_image": moved}, x, method="up")
    tiling = tiles.Tiling(
        8, tiles.decoder_halo(autoencoder.shape.factor, autoencoder.shape.layers), 1, autoencoder.factor, 0
    )
    result = tiles.compute_tiled(
        lambda window, tile, known: (decoder.apply(variables | {"of_image": moved}, window, tile, method="up"), {}),
        x,
        tiling,
    )
    np.testing.assert_allclose(result, expected, atol=2e-5)


@pytest.mark.parametrize("shape", [STABLE_DIFFUSION, "tiny"])
def test_halos_are_as_wide_as_convolutions_reach(shape, autoencoder):
    """By the positions that one latent pixel reaches: no more, and no fewer."""
    shape = autoencoder.shape if shape == "tiny" else shape
    thin = dataclasses.replace(shape, widths=(1,) * len(shape.widths), groups=1, latent_channels=1, image_channels=1)
    for half, method, halo in (
        (Decoder(thin), "up", tiles.decoder_halo(shape.factor, shape.layers)),
        (Encoder(thin), "down", tiles.encoder_halo(shape.factor, shape.layers)),
    ):
        size = 2 * halo + 3
        zoom = 1 if method == "up" else shape.factor
        reached = _reached(half, method, size * zoom, zoom)
        rows = np.flatnonzero(reached.reshape(size, -1).any(1))
        assert max(size // 2 - rows[0], rows[-1] - size // 2) == halo


def _reached(half, method, size, zoom):
    """Which rows of the result the central latent pixel reaches: kernels are 1, biases 0, norms do nothing, so that
    what is not reached stays 0."""
    x = jnp.zeros((1, size, size, 1))
    start = size // 2 // zoom * zoom
    x = x.at[:, start : start + zoom, start : start + zoom].set(1.0)
    image = jnp.zeros((1, half.shape.factor, half.shape.factor, 1))
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.full(leaf.shape, float(path[-1].key != "bias")),
        nn.unbox(jax.eval_shape(half.init, jax.random.key(0), image))["params"],
    )
    tile = tiles.Tile(jnp.zeros(4, int), size // zoom)
    shapes = jax.eval_shape(lambda: half.apply({"params": params}, x, tile, method=method, mutable=["moments"]))[1]
    known = jax.tree.map(
        lambda m: NormMoments(jnp.ones(()), jnp.zeros(m.mean.shape), jnp.ones(m.mean.shape)),
        shapes["moments"],
        is_leaf=lambda leaf: isinstance(leaf, NormMoments),
    )
    y = jax.jit(lambda x: half.apply({"params": params, "of_image": known}, x, method=method))(x)
    return np.asarray(y != 0).any((0, 2, 3))


@pytest.mark.slow
def test_the_peak_is_bounded_by_a_tile(autoencoder):
    """Four times the image: four times the memory as a whole, that of a tile, the result and its input in tiles."""

    def peak(autoencoder, size):
        x = jax.ShapeDtypeStruct((1, size, size, 16), jnp.float32)
        program = jax.jit(lambda p, x: _up(autoencoder, p, x))
        compiled = program.lower(autoencoder.abstract_params()["decoder"], x).compile().memory_analysis()
        return compiled.temp_size_in_bytes

    small, large = (peak(tiled(autoencoder, 8, 1), size) for size in (32, 64))
    results = [4 * (size * autoencoder.factor) ** 2 * 3 for size in (32, 64)]
    assert large - small <= 2 * (results[1] - results[0])
    assert peak(autoencoder, 64) > 3.5 * peak(autoencoder, 32) > 3.5 * small


def _up(autoencoder, params, x):
    tiling = tiles.Tiling(
        autoencoder.tile,
        tiles.decoder_halo(autoencoder.shape.factor, autoencoder.shape.layers),
        1,
        autoencoder.factor,
        1,
    )
    return autoencoder._levels(Decoder(autoencoder.shape), params, "up", x, tiling)


def test_a_tile_as_large_as_the_image_is_the_whole(autoencoder):
    x = inputs(autoencoder, "decode")
    np.testing.assert_array_equal(tiled(autoencoder, 64, 1).decode(x), autoencoder.decode(x))
    assert TINY["sample_size"] == 32  # which nothing reads
