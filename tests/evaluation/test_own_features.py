"""The trained extractor: it learns its classes, is the same twice, and its hash is that of its weights."""

import functools

import jax
import numpy as np
import pytest

from efficientllm.errors import UserError
from efficientllm.evaluation import frechet, own_features


def pictures(count=240, seed=0):
    """uint8 pictures of three classes: a bright bar at another place, under noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count).astype(np.int32)
    images = rng.integers(0, 120, (count, 8, 8, 1), np.uint8)
    images[np.arange(count), 2 + 2 * labels] += 130
    return images, labels


@functools.cache
def trained(seed=0):
    return own_features.train(*pictures(), 3, steps=25, seed=seed)


@pytest.mark.slow
def test_it_learns_the_classes_and_its_features_tell_sets_apart():
    images, labels = pictures(seed=1)
    assert own_features.accuracy(trained(), images, labels) > 0.95
    extractor = own_features.extractor(trained())
    features = extractor.features(images)
    assert features.shape == (240, 64) and extractor.name == "own"
    same = frechet.distance(features, extractor.features(pictures(seed=2)[0]))
    one_class = frechet.distance(features, extractor.features(np.repeat(images[labels == 0], 3, 0)))
    assert one_class > 5 * same


@pytest.mark.slow
def test_blocks_do_not_change_features(monkeypatch):
    extractor, (images, _) = own_features.extractor(trained()), pictures(seed=3)
    whole = extractor.features(images)
    monkeypatch.setattr(own_features, "BLOCK", 100)
    np.testing.assert_allclose(extractor.features(images), whole, rtol=1e-5, atol=1e-5)


def test_the_hash_is_that_of_the_weights():
    params = trained()
    assert own_features.extractor(params).sha256 == own_features.sha256(dict(reversed(params.items())))
    changed = jax.tree.map(np.copy, params)
    changed["Conv_0"]["bias"][0] += 1e-6
    assert own_features.sha256(changed) != own_features.sha256(params)


@pytest.mark.slow
def test_training_gives_the_same_weights_twice():
    assert own_features.sha256(trained()) == own_features.sha256(own_features.train(*pictures(), 3, steps=25))


def test_one_class_is_refused():
    images, labels = pictures()
    with pytest.raises(UserError, match="need pictures of two classes at least"):
        own_features.train(images, 0 * labels, 1)
