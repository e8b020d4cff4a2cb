"""Quality of samples where the answer is known: training pictures, held-out pictures, noise."""

import numpy as np
import pytest

from efficientllm.errors import UserError
from efficientllm.evaluation import frechet, own_features, picture_reference, sample_quality
from evaluation import pictures

pytestmark = pytest.mark.xdist_group("sample_quality")  # they share a trained network
LETTERS = "glyphs(size=8, channels=1, letters='OITLXC', held_out=0.1)"
TRAIN = own_features.train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own_features, "train", lambda *data: TRAIN(*data, steps=25))
        yield pictures.data(tmp_path_factory.mktemp("cache"), LETTERS)


@pytest.fixture(scope="module")
def measured(data):
    """`{kind of sample: (readings, facts)}`."""
    reference = picture_reference.load_reference(data)
    noise = np.random.default_rng(0).integers(0, 256, (70, 8, 8, 1), dtype=np.uint8)
    kinds = {"copies": reference.training, "noise": noise}
    return {kind: sample_quality.measure(images, data, "euler in 28 steps") for kind, images in kinds.items()}


def values(measured, kind):
    return {key: reading.value for key, reading in measured[kind][0].items()}


@pytest.mark.slow
def test_copies_are_as_near_as_training_pictures_and_noise_is_far(measured):
    copies, noise = values(measured, "copies"), values(measured, "noise")
    assert copies["fd_own"] < copies["fd_own_floor"] < noise["fd_own"] / 5
    assert copies["kd_own"] < noise["kd_own"]
    assert copies["sample_recall"] == 1 and copies["sample_precision"] > 0.9
    assert noise["sample_recall"] == 0


def test_copies_are_not_new_and_noise_is(measured):
    assert values(measured, "copies")["nearest_ratio"] == 0 and values(measured, "noise")["nearest_ratio"] > 1


def test_held_out_pictures_are_as_new_as_themselves(data):
    reference = picture_reference.load_reference(data)
    readings, _ = sample_quality.measure(reference.held_out, data)
    assert readings["nearest_ratio"].value == pytest.approx(1)
    assert "64 features" in readings["fd_own"].reason and "raise config.quality.fd" in readings["fd_own"].reason


def test_the_row_says_how_many_samples_and_which_network(measured, data):
    readings, facts = measured["noise"]
    reference = picture_reference.load_reference(data)
    extractor = own_features.extractor(sample_quality.load_parameters(data, reference))
    assert facts["count"] == 70 and facts["sha256"] == extractor.sha256 and len(extractor.sha256) == 64
    assert facts["extractor"] == "own" and 0 < facts["accuracy"] <= 1
    assert facts["interval"][0] < facts["interval"][1] and facts["compared"] + min(70, len(reference) // 2) == len(
        reference
    )
    source = readings["fd_own"].source
    assert "70 samples (euler in 28 steps)" in source and extractor.sha256[:12] in source
    assert set(readings) == set(sample_quality.KEYS) and "fid" not in sample_quality.KEYS


def test_the_floor_is_that_of_as_many_training_pictures(measured, data):
    reference = picture_reference.load_reference(data)
    extractor = own_features.extractor(sample_quality.load_parameters(data, reference))
    order, half = np.random.default_rng(0).permutation(len(reference)), len(reference) // 2
    assert half < 70
    features = extractor.features(reference.training[order])
    direct = frechet.distance(features[:half], features[half:])
    assert values(measured, "noise")["fd_own_floor"] == pytest.approx(direct, rel=1e-4)


def test_the_network_is_trained_once_for_all_runs_on_the_data(data, measured, monkeypatch):
    reference = picture_reference.load_reference(data)
    monkeypatch.setattr(own_features, "train", lambda *_: pytest.fail("the cache has it"))
    again = pictures.data(data.cache, LETTERS)
    params = sample_quality.load_parameters(again, picture_reference.load_reference(again))
    assert own_features.sha256(params) == measured["copies"][1]["sha256"]
    others = sample_quality.load_parameters(data, reference)
    assert own_features.sha256(others) == own_features.sha256(params)


def test_without_classes_there_is_no_distance_and_a_reason(tmp_path):
    data = pictures.data(tmp_path, "glyphs(size=16, letters='O', held_out=0.2)")
    reference = picture_reference.load_reference(data)
    with pytest.raises(UserError, match="two classes"):
        sample_quality.load_parameters(data, reference)
    readings, facts = sample_quality.measure(reference.training, data)
    assert "two classes" in readings["fd_own"].reason and readings["nearest_ratio"].value == 0
    assert "sha256" not in facts


def test_without_held_out_pictures_newness_has_no_measure(tmp_path):
    data = pictures.data(tmp_path, "glyphs(size=16, letters='O', held_out=0.0)")
    readings, _ = sample_quality.measure(picture_reference.load_reference(data).training, data)
    assert readings["nearest_ratio"].reason == "nothing to compare with: no picture is held out"
