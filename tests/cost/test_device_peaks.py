import types

import jax
import jax.numpy as jnp
import pytest

from efficientllm.cost import device_peaks

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFICIENTLLM_CACHE", str(tmp_path))
    device_peaks.measure_gemm_peak.cache_clear()
    yield tmp_path
    device_peaks.measure_gemm_peak.cache_clear()


def gpus(kind, count):
    return [types.SimpleNamespace(device_kind=kind, platform="gpu", process_index=0) for _ in range(count)]


def test_peaks_are_dense_and_name_their_source():
    reading = device_peaks.peak_flops("NVIDIA H100 80GB HBM3", "bfloat16")
    assert reading.value == 989e12 and "datasheet" in reading.source
    assert device_peaks.peak_bandwidth("NVIDIA H200").value == 4.8e12
    assert all(peak.source and peak.bandwidth > 1e11 for peak in device_peaks.PEAKS.values())


@pytest.mark.parametrize("kind", ["NVIDIA H100", "nvidia h100 80gb hbm3", "cpu", "NVIDIA GeForce RTX 4090 Laptop GPU"])
def test_a_name_that_is_only_near_has_no_peak(kind):
    assert device_peaks.peak_flops(kind, "bfloat16").value is None
    assert kind in device_peaks.peak_bandwidth(kind).reason


def test_a_dtype_without_a_figure_has_no_peak():
    assert device_peaks.peak_flops("TPU v6 lite", "float32").value is None


def test_utilisation_divides_by_time_devices_and_peak(monkeypatch):
    monkeypatch.setattr(device_peaks, "_best_gemm", lambda dtype: 700e12)
    used = device_peaks.model_flops_utilisation(4 * 989e12, 2.0, gpus("NVIDIA H100 80GB HBM3", 4), jnp.bfloat16)
    assert used["mfu"].value == pytest.approx(0.5)
    assert used["mfu_gemm"].value == pytest.approx(0.5 * 989 / 700)
    assert "causal half" in used["mfu"].source


def test_float32_on_nvidia_is_held_against_tf32(monkeypatch):
    monkeypatch.setattr(device_peaks, "_best_gemm", lambda dtype: 100e12)
    used = device_peaks.model_flops_utilisation(156e12, 1.0, gpus("NVIDIA A100-SXM4-80GB", 1), jnp.float32)
    assert used["mfu"].value == pytest.approx(1.0)


def test_an_unknown_device_has_null_mfu_but_one_against_its_own_gemm(monkeypatch):
    monkeypatch.setattr(device_peaks, "_best_gemm", lambda dtype: 50e9)
    used = device_peaks.model_flops_utilisation(10e9, 1.0, jax.devices(), "float32")
    assert used["mfu"].value is None and used["mfu"].reason
    assert used["mfu_gemm"].value == pytest.approx(0.2), "eight CPU devices share the cores of one"


def test_the_gemm_peak_is_measured_once_a_host(monkeypatch, cache):
    calls = []
    monkeypatch.setattr(device_peaks, "_best_gemm", lambda dtype: calls.append(dtype) or 1e9 * len(calls))
    first = device_peaks.measure_gemm_peak("float32")
    device_peaks.measure_gemm_peak.cache_clear()  # as another process would find it
    assert device_peaks.measure_gemm_peak("float32") == first
    assert device_peaks.measure_gemm_peak("bfloat16").value == 2e9
    assert calls == ["float32", "bfloat16"]
    assert [path.name for path in cache.iterdir()] == ["gemm_peaks.json"]


def test_a_matrix_product_is_really_timed():
    rate = device_peaks._best_gemm("float32", sizes=(256,), repeats=3)
    assert 1e8 < rate < 1e14


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": NaN}', '{"key": "fast"}', '{"key": -1.0}', "[" * 100_000])
def test_a_damaged_file_of_rates_is_measured_again(tmp_path, monkeypatch, content):
    monkeypatch.setenv("EFFICIENTLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(device_peaks, "_host_key", lambda what: "key")
    (tmp_path / "rates.json").write_text(content)
    assert device_peaks._cached("rates.json", "x", lambda: 2.0) == 2.0
    assert device_peaks._cached("rates.json", "x", lambda: pytest.fail("measured twice")) == 2.0


def test_rates_that_cannot_be_kept_are_measured(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EFFICIENTLLM_CACHE", str(tmp_path / "file"))
    assert device_peaks._cached("rates.json", "x", lambda: 2.0) == 2.0
