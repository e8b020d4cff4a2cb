"""Distances of feature sets against scipy's matrix square root, direct sums and known Gaussians."""

import numpy as np
import pytest
import scipy.linalg

from efficientllm.errors import UserError
from efficientllm.evaluation import frechet

pytestmark = pytest.mark.quick


def features(seed, count=60, dimensions=12, scale=1.0):
    rng = np.random.default_rng(seed)
    return scale * rng.standard_normal((count, dimensions)) @ rng.standard_normal((dimensions, dimensions))


def by_square_root(first, second):
    """The distance as it is published, with the general matrix square root."""
    difference = first.mean - second.mean
    root = scipy.linalg.sqrtm(first.covariance @ second.covariance)
    return difference @ difference + np.trace(first.covariance + second.covariance - 2 * root.real)


def test_the_frechet_distance_is_that_of_the_matrix_square_root():
    first, second = frechet.moments(features(0)), frechet.moments(features(1, 90, scale=0.5) + 1)
    actual = frechet.frechet_distance(first.mean, first.covariance, second.mean, second.covariance)
    assert actual == pytest.approx(by_square_root(first, second), rel=1e-10)
    assert frechet.distance(features(0), features(1, 90, scale=0.5) + 1) == actual


def test_gaussians_with_a_closed_form():
    """Commuting covariances: the sum of squared differences of means and of standard deviations."""
    mean, deviations = np.array([1.0, -2.0, 0.5]), np.array([[1.0, 2.0, 3.0], [0.5, 4.0, 3.0]])
    actual = frechet.frechet_distance(mean, np.diag(deviations[0] ** 2), 0 * mean, np.diag(deviations[1] ** 2))
    assert actual == pytest.approx(np.sum(mean**2) + np.sum((deviations[0] - deviations[1]) ** 2), rel=1e-12)


def test_a_singular_covariance_needs_no_ridge():
    """Ten pictures of twelve dimensions; the distance to itself and to a shifted copy are exact."""
    first = frechet.moments(features(2, count=10))
    itself = frechet.frechet_distance(first.mean, first.covariance, first.mean, first.covariance)
    shifted = frechet.frechet_distance(first.mean, first.covariance, first.mean + 2, first.covariance)
    # Square roots of eigenvalues that are rounding of zero: sqrt(1e-16) of the largest.
    assert itself == pytest.approx(0, abs=1e-6 * np.trace(first.covariance))
    assert shifted - itself == pytest.approx(4 * 12, rel=1e-10)


def test_moments_are_unbiased_and_need_two_pictures():
    values = features(3)
    covariance = (values - values.mean(0)).T @ (values - values.mean(0)) / (len(values) - 1)
    np.testing.assert_allclose(frechet.moments(values).covariance, covariance, rtol=1e-12)
    with pytest.raises(UserError, match="a covariance of 1 pictures: needs two"):
        frechet.moments(values[:1])


def test_the_kernel_distance_is_the_sum_over_pairs():
    first, second = features(4, 7), features(5, 9)

    def kernel(x, y):
        return (x @ y / len(x) + 1) ** 3

    def within(side):
        pairs = [kernel(x, y) for i, x in enumerate(side) for j, y in enumerate(side) if i != j]
        return sum(pairs) / len(pairs)

    between = sum(kernel(x, y) for x in first for y in second) / (len(first) * len(second))
    expected = within(first) + within(second) - 2 * between
    assert frechet.kernel_distance(first, second) == pytest.approx(expected, rel=1e-10)
    with pytest.raises(UserError, match="a kernel distance of 1 and 9 pictures"):
        frechet.kernel_distance(first[:1], second)


def test_the_kernel_distance_is_unbiased_and_the_frechet_distance_is_not():
    """Over pairs of sets of one distribution, one mean is zero within its error, and the other is far above."""
    rng = np.random.default_rng(0)
    sets = [rng.standard_normal((2, 20, 4)) for _ in range(200)]
    kernel = np.array([frechet.kernel_distance(*pair) for pair in sets])
    assert abs(kernel.mean()) < 3 * kernel.std() / np.sqrt(len(sets))
    assert np.mean([frechet.distance(*pair) for pair in sets]) > 0.3


def test_floor_and_interval():
    reference = features(6, 400, 4)
    assert 0 < frechet.floor(frechet.distance, reference) < frechet.distance(features(6, 400, 4) + 2, reference)
    low, high = frechet.interval(frechet.kernel_distance, features(7, 50, 4), reference, draws=40)
    assert low < frechet.kernel_distance(features(7, 50, 4), reference) < high
    assert (low, high) == frechet.interval(frechet.kernel_distance, features(7, 50, 4), reference, draws=40)


def test_the_nearest_training_picture():
    training = np.random.default_rng(8).random((50, 4, 4, 3))
    samples = training[[7, 3, 31]] + np.array([0, 0.001, 0.002]).reshape(3, 1, 1, 1)
    indices, distances = frechet.nearest(samples, training, block=2)
    assert indices.tolist() == [7, 3, 31]
    np.testing.assert_allclose(distances, np.array([0, 0.001, 0.002]) * np.sqrt(48), rtol=1e-9)


def test_only_features_of_inception_give_an_fid():
    assert frechet.columns("inception_v3") == ("fid", "kid")
    assert frechet.columns("own") == ("fd_own", "kd_own")


def test_precision_and_recall_count_pictures_within_reach():
    """Reference pictures on a line, one apart: the reach of k = 3 is 2, or 3 at the ends."""
    reference = np.arange(10.0)[:, None]
    assert frechet.precision_recall(reference, reference) == (1.0, 1.0)
    far = np.concatenate([np.full((5, 1), 100.0) + np.arange(5)[:, None] / 100, np.array([[4.5], [-2.9]])])
    precision, recall = frechet.precision_recall(far, reference)
    assert precision == pytest.approx(2 / 7)
    assert recall == 1.0  # the third neighbour of the sample at 4.5 is 95.5 away
    assert frechet.precision_recall(reference[:5] / 10 + 4, reference)[1] == pytest.approx(0.1)
    with pytest.raises(UserError, match="precision and recall of 3 pictures: need more than k = 3"):
        frechet.precision_recall(reference[:3], reference)


def test_samples_of_the_data_itself_are_at_the_floor():
    """Features of one distribution in all three sets; and of another in the samples."""
    rng = np.random.default_rng(9)
    sets = [rng.integers(0, 256, (200, 2, 2, 1), np.uint8) for _ in range(3)]
    flat = frechet.Extractor("flat", lambda images: images.reshape(len(images), -1) / 255)
    same = frechet.compare(flat, *sets, draws=20)
    assert same["fd_flat"] == pytest.approx(frechet.distance(*(flat.features(images) for images in sets[:2])))
    assert 0.2 < same["fd_flat"] / same["fd_flat_floor"] < 5 and same["samples"] == 200
    other = frechet.compare(flat, sets[0] // 2, *sets[1:], draws=20)
    assert other["fd_flat_low"] > 10 * same["fd_flat"] and other["fd_flat_floor"] == same["fd_flat_floor"]
    assert other["kd_flat"] > 0 and other["recall"] < same["recall"]
    with pytest.raises(UserError, match="4 samples: flat has 4 features, and a Frechet distance needs more samples"):
        frechet.compare(flat, sets[0][:4], *sets[1:])
