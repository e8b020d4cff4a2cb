"""The nearest training picture against a direct search, and the cache of small pictures."""

import numpy as np
import pytest

from efficientllm.evaluation import picture_reference
from evaluation import pictures

pytestmark = pytest.mark.quick


@pytest.fixture
def data(tmp_path):
    return pictures.data(tmp_path)


def test_a_copy_is_found_and_its_distance_is_zero(data):
    reference = picture_reference.load_reference(data)
    copies = [3, 0, len(reference) - 1]
    nearest = picture_reference.find_nearest(reference.training[copies], reference)
    assert nearest.distances.tolist() == [0, 0, 0] and not nearest.mirrored.any()
    assert np.array_equal(picture_reference.read_pictures(data, nearest), reference.training[copies])
    assert np.array_equal(nearest.indices, data.indices("train")[copies])


def test_the_distance_is_the_root_mean_square_of_pixels(data, monkeypatch):
    monkeypatch.setattr(picture_reference, "_BLOCK", 7)
    reference = picture_reference.load_reference(data)
    samples = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    differences = samples[:, None].astype(float) - reference.training[None]
    direct = np.sqrt(np.mean(differences**2, (2, 3, 4)))
    nearest = picture_reference.find_nearest(samples, reference)
    assert nearest.distances == pytest.approx(direct.min(1))
    assert np.array_equal(nearest.indices, reference.indices[direct.argmin(1)])


def test_mirror_images_count_where_they_are_trained_on(data):
    reference = picture_reference.load_reference(data)
    mirrored = reference.training[:4, :, ::-1]
    plain = picture_reference.find_nearest(mirrored, reference)
    flipped = reference.__class__(**{**vars(reference), "flipped": True})
    both = picture_reference.find_nearest(mirrored, flipped)
    assert plain.distances.max() > 0 and both.distances.tolist() == [0] * 4
    assert both.mirrored.any() and np.array_equal(picture_reference.read_pictures(data, both), mirrored)


def test_held_out_pictures_are_no_training_pictures(data):
    reference = picture_reference.load_reference(data)
    assert len(reference) + len(reference.held_out) == len(data.pictures) and len(reference.held_out)
    direct = picture_reference.find_nearest(reference.held_out, reference)
    assert picture_reference.unseen_distance(reference) == pytest.approx(np.median(direct.distances))
    assert len(reference.labels) == len(reference) and len(reference.held_out_labels) == len(reference.held_out)


def test_large_pictures_are_averaged_over_boxes():
    image = np.zeros((1, 64, 64, 3), np.uint8)
    image[0, :2, :2] = [[[0, 10, 20], [40, 50, 60]], [[0, 10, 20], [40, 50, 60]]]
    small = picture_reference.shrink(image)
    assert small.shape == (1, 32, 32, 3) and small[0, 0, 0].tolist() == [20, 30, 40] and not small[0, 1:].any()
    assert picture_reference.shrink(image[:, :, :, :1]).shape == (1, 32, 32, 1)
    assert picture_reference.shrink(small) is small


def test_of_many_pictures_evenly_spaced_ones_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(picture_reference, "MOST", 10)
    data = pictures.data(tmp_path)
    reference = picture_reference.load_reference(data)
    train = data.indices("train")
    assert len(reference) == 10 and reference.indices.tolist() == [train[len(train) * i // 10] for i in range(10)]
    assert np.array_equal(reference.training[3], data.pictures[int(reference.indices[3])])
