import pytest

from efficientllm.metrics.energy.reader import EnergyWindow, IdlePower
from efficientllm.metrics.reading import Reading
from efficientllm.metrics.sampler import Averages
from efficientllm.record.study_metrics import UNITS, Compression, Work, energy_metrics, paper_metrics

pytestmark = pytest.mark.quick

AVERAGES = Averages(10.0, 42.0e9, 0.4375, "nvml memory in use", 0.93, "nvml utilisation", 5e9, 640.0)
ENERGY = EnergyWindow(6400.0, 640.0, 10.0, "nvml energy counter", "gpu", "measured", 0.004, None)
VOID = EnergyWindow(None, None, 10.0, "nvml energy counter", "gpu", "measured", None, "the energy counter was reset")
BLIND = Averages(10.0, None, None, "nvml memory in use", None, "nvml utilisation", 5e9, None)


def pretraining(**changes):
    fields = {"task": "pretrain", "iterations_s": (0.4, 0.6), "duration_s": 10.0, "params_active": 1000, "tokens": 5000}
    return Work(**{**fields, **changes})


def value(readings):
    return {key: reading.value for key, reading in readings.items() if reading.value is not None}


def test_every_metric_of_pretraining_by_its_equation():
    readings = paper_metrics(pretraining(), AVERAGES, ENERGY)
    assert set(readings) == set(UNITS)
    assert value(readings) == pytest.approx(
        {
            "amu_gb": 42.0,
            "amu_fraction": 0.4375,
            "pcu": 0.93,
            "al_s": 0.5,
            "tt_tokens_per_param_s": 5000 / 1000 / 10.0,
            "aec_w": 640.0,
        }
    )
    assert all(reading.unit == UNITS[key] for key, reading in readings.items())
    assert "0.4%" in readings["aec_w"].source


def test_tuning_and_inference_have_their_own_throughput():
    tuned = paper_metrics(pretraining(task="tune", tokens=None, samples=80), AVERAGES, ENERGY)
    assert tuned["st_samples_per_param_s"].value == pytest.approx(80 / 1000 / 10.0)
    assert tuned["tt_tokens_per_param_s"].value is None and "pretrain" in tuned["tt_tokens_per_param_s"].reason
    served = paper_metrics(pretraining(task="infer", tokens=None, generated=300), AVERAGES, ENERGY)
    assert served["it_tokens_per_s"].value == pytest.approx(30.0)
    assert served["st_samples_per_param_s"].value is None


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "infer"},
        {"task": "infer", "tokens": None, "samples": 300},
        {"samples": 300},
        {"tokens": None},
        {"task": "serve"},
    ],
    ids=["tokens of training", "generated tokens as samples", "two counts", "no count", "no such task"],
)
def test_no_count_passes_under_anothers_name(changes):
    with pytest.raises(ValueError):
        pretraining(**changes)


def test_what_was_not_measured_is_null_with_its_reason():
    readings = paper_metrics(pretraining(iterations_s=()), BLIND, VOID)
    assert list(value(readings)) == ["tt_tokens_per_param_s"]
    assert readings["aec_w"].reason == "the energy counter was reset"
    assert all(reading.reason for reading in readings.values() if reading.value is None)


def test_compression_rate_weighs_measured_bytes_with_quality():
    int4 = Compression(16_000, 5_000, 0.50, 0.48, "accuracy")
    assert paper_metrics(pretraining(), AVERAGES, ENERGY, int4)["mcr"].value == pytest.approx(3.2 * 0.96)
    baseline = Compression(16_000, 16_000, 0.50, 0.50, "accuracy")
    assert paper_metrics(pretraining(), AVERAGES, ENERGY, baseline)["mcr"].value == 1.0
    assert paper_metrics(pretraining(), AVERAGES, ENERGY)["mcr"].reason == "nothing is compressed in this run"


def test_energy_per_token_gross_and_net():
    readings = energy_metrics(ENERGY, tokens=3200, idle=IdlePower(140.0, None))
    assert value(readings) == pytest.approx(
        {"energy_j": 6400.0, "j_per_token": 2.0, "j_per_token_net": (6400 - 1400) / 3200}
    )
    assert energy_metrics(ENERGY, tokens=3200)["j_per_token_net"].reason == "idle power was not measured"
    assert value(energy_metrics(VOID, tokens=3200, idle=IdlePower(140.0, None))) == {}
    drifted = IdlePower(140.0, None).compared(IdlePower(150.0, None))
    assert "drifted by +7.1%" in energy_metrics(ENERGY, tokens=3200, idle=drifted)["j_per_token_net"].reason


def test_a_reading_is_a_number_or_a_reason():
    for fields in ({"value": None}, {"value": 1.0, "reason": "why"}, {"value": float("nan")}, {"value": float("inf")}):
        with pytest.raises(ValueError):
            Reading(**{"unit": "s", "source": "test", **fields})
