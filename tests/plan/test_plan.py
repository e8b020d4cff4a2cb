"""Plans beside the runs they are of, and without a device, a compiler, or weights."""

import importlib.util
import json
import subprocess
import sys

import pytest

import runs
from efficientllm import main
from efficientllm.config.presets import base
from efficientllm.metrics import host
from efficientllm.record.workdir import Workdir
from efficientllm.report import rows

SIZE = (
    "custom(num_layers=2, dim=32, num_heads=2, num_kv_heads=1, head_dim=16, hidden=48, rope_base=1e4, vocab_size=264)"
)


def plan(workdir, config="configs/base.py", **overrides):
    """`(exit status, row)` of a plan that needs neither data nor tokenizer."""
    values = {"model__size": SIZE, "train__length": 32, "task": "plan", **overrides}
    status = main.main(runs.arguments("nowhere", workdir, config, **values))
    file = workdir / "record.json"
    return status, json.loads(file.read_text()) if file.exists() else None


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The folder of a run of two steps on eight devices, and its row."""
    folder = tmp_path_factory.mktemp("measured")
    argv = runs.arguments(runs.corpus(folder / "texts"), folder / "run", model__size=SIZE, train__steps=2)
    assert main.main([*argv, "--config.mesh=data=2, fsdp=4"]) == 0
    return folder / "run", json.loads((folder / "run" / "record.json").read_text())


@pytest.mark.slow
def test_a_plan_says_beforehand_what_the_run_s_program_needs(measured, tmp_path, capsys):
    run, theirs = measured
    status, row = plan(tmp_path / "plan", plan__devices=8, mesh="data=2, fsdp=4")
    ours, text = row["predicted"], capsys.readouterr().out
    assert status == 0 and ours["source"] == "compiler"
    assert ours["peak_bytes"] * 8 == theirs["physical"]["compiled_memory_bytes"]
    assert ours["by_shapes_bytes"] * 8 == theirs["physical"]["predicted_memory_bytes"]
    assert ours["program_flops"] == theirs["physical"]["program_flops_per_token"] * 8 * 32
    assert row["physical"]["flops_per_token"] == theirs["physical"]["flops_per_token"]
    assert ours["kernels"] == theirs["provenance"]["kernels"]
    assert ours["fits"] and ours["changes"] == [] and ours["moved_bytes"] > ours["peak_bytes"]
    assert ours["collectives"]["all-reduce"]["wire_bytes"] > 0
    assert {"products", "attention", "optimizer", "collectives"} <= {line.split()[0] for line in text.splitlines()}
    assert ours["step_s"] == max(ours["roofline_s"].values()) == ours["roofline_s"][ours["bound"]] == ours["al_s"]
    assert f"peak {ours['peak_bytes'] / 1e9:.2f}" in text and f"bound by {ours['bound']}" in text
    assert row["paper"].keys() == theirs["paper"].keys() and set(row["paper"].values()) == {None}
    assert rows.read_row(tmp_path / "plan" / "record.json").predicted


def test_a_run_s_folder_is_not_a_plan_s(tmp_path, capsys):
    config = base.get_config()
    config.model.unroll = 0
    Workdir(config, tmp_path).claim(config)
    assert plan(tmp_path) == (2, None)
    assert "holds a run; a plan needs a folder of its own" in capsys.readouterr().err


@pytest.mark.slow
def test_measured_rows_scale_a_plan_and_say_how_well(measured, tmp_path, capsys):
    run, record = measured
    least = plan(tmp_path / "least", plan__devices=8, mesh="data=2, fsdp=4")[1]["predicted"]["step_s"]
    for name, times, watts in (("a", 2.0, 160.0), ("b", 4.5, 240.0)):
        paper = record["paper"] | {"al_s": times * least, "aec_w": watts, "pcu": 0.5}
        (tmp_path / "rows" / name).mkdir(parents=True)
        (tmp_path / "rows" / name / "record.json").write_text(json.dumps(record | {"paper": paper}))
    options = {"plan__devices": 8, "mesh": "data=2, fsdp=4"}
    predicted = plan(tmp_path / "first", plan__calibration=tmp_path / "rows", **options)[1]["predicted"]
    assert predicted["calibration"] == pytest.approx(
        {"rows": 2, "factor": 3.0, "median_error": (1.25 + 5 / 9) / 2, "worst_error": 1.25}
    )
    assert (predicted["al_s"], predicted["aec_w"], predicted["pcu"]) == pytest.approx((3 * least, 200.0, 0.5))
    assert predicted["step_s"] == least
    replanned = plan(tmp_path / "again", plan__calibration=tmp_path / "first" / "calibration.json", **options)[1]
    assert replanned["predicted"]["al_s"] == predicted["al_s"]
    capsys.readouterr()
    refused = {tmp_path / "none": "no such file", run / "config.json": "no calibration", tmp_path / "least": "no timed"}
    for options_given, message in refused.items():
        assert plan(tmp_path / "bad", plan__calibration=options_given, **options)[0] == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_what_does_not_fit_says_which_change_would_do(monkeypatch, tmp_path, capsys):
    options = {"plan__devices": 2, "train__batch_size": 4, "train__length": 128, "model__remat": "full"}
    fitting = plan(tmp_path / "a", **options)[1]["predicted"]
    monkeypatch.setattr(host, "memory_total_bytes", lambda: 2 * int(0.8 * fitting["peak_bytes"]))
    status, row = plan(tmp_path / "b", **options)
    predicted = row["predicted"]
    assert status == 0 and not predicted["fits"]
    tried = {remedy["flags"]: remedy for remedy in predicted["changes"]}
    assert list(tried) == ["--config.mesh=fsdp=2", "--config.train.accumulate=2"]
    assert tried["--config.train.accumulate=2"]["fits"]
    assert "would fit" in capsys.readouterr().out
    change = tried["--config.train.accumulate=2"]["change"]
    options |= {key.replace(".", "__"): value for key, value in change.items()}
    again = plan(tmp_path / "c", **options)[1]["predicted"]
    assert again["fits"] and again["peak_bytes"] == tried["--config.train.accumulate=2"]["total_bytes"]


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_made_to_and_said(tmp_path, capsys):
    _, row = plan(tmp_path / "plan", plan__devices=3)
    assert row["config"]["train"]["batch_size"] == 9
    assert "config.train.batch_size = 8 does not divide over 3 devices: planned with 9" in capsys.readouterr().out


@pytest.mark.slow
def test_a_tuning_plan_needs_no_weights(tmp_path):
    overrides = {"plan__hardware": "cpu", "adapter": "lora(rank=2)"}
    status, row = plan(tmp_path / "plan", "configs/tune.py:lora", **overrides)
    assert status == 0
    assert row["physical"]["params_trainable"] < row["physical"]["params_total"] / 10
    assert row["predicted"]["st_samples_per_param_s"] > 0


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is not None, reason="the compiler is installed")
def test_without_its_compiler_the_plan_is_of_shapes_and_says_so(tmp_path, capsys):
    status, row = plan(tmp_path / "plan", plan__hardware="h100", plan__devices=8)
    printed = capsys.readouterr().out
    assert status == 0 and "[gpu]'" in printed and "from shapes alone" in printed
    predicted = row["predicted"]
    assert predicted["source"] == "shapes" and predicted["peak_bytes"] == predicted["by_shapes_bytes"]
    assert predicted["moved_bytes"] is None and predicted["roofline_s"].keys() == {"compute", "network"}
    assert predicted["collectives"].keys() == {"all-reduce"} and predicted["roofline_s"]["network"] > 0
    assert "all-reduce         by formula" in printed
    assert row["provenance"]["devices"]["kind"] == "NVIDIA H100 80GB HBM3"


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is not None, reason="the compiler is installed")
def test_without_its_compiler_the_kernels_are_still_the_hardware_s(tmp_path):
    options = {"plan__hardware": "h100", "model__precision": "bfloat16"}
    status, row = plan(tmp_path / "plan", **options)
    assert status == 0 and row["predicted"]["kernels"]["attention"] == ["cudnn"]


def test_what_cannot_be_planned_is_one_line(tmp_path, capsys):
    for overrides, message in (
        ({"plan__hardware": "h201"}, "did you mean 'h200'"),
        ({"plan__hardware": "v5e", "plan__devices": 5}, "4, 8, 16"),
        ({"plan__devices": 64}, "8 CPU devices already"),
    ):
        status, row = plan(tmp_path / "plan", **overrides)
        assert (status, row) == (2, None)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name, plugin, devices", [("gh200_96", "jax_cuda13_plugin", 8), ("v5e", "libtpu", 8)])
def test_hardware_that_is_not_here(name, plugin, devices, tmp_path):
    if importlib.util.find_spec(plugin) is None:
        pytest.skip(f"{plugin} is not installed")
    overrides = {"plan__hardware": name, "plan__devices": devices, "model__precision": "bfloat16", "mesh": "fsdp=-1"}
    argv = runs.arguments("nowhere", tmp_path / "plan", task="plan", model__size=SIZE, train__length=256, **overrides)
    done = subprocess.run(
        [sys.executable, "-m", "efficientllm.main", *argv], cwd=runs.ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    predicted = json.loads((tmp_path / "plan" / "record.json").read_text())["predicted"]
    assert predicted["source"] == "compiler" and predicted["fits"]
    assert predicted["kernels"]["attention"] == ["cudnn" if name == "gh200_96" else "splash"]
    assert any("fmha" in call or "tpu" in call for call in predicted["custom_calls"])
    assert predicted["collectives"]["all-gather"]["bytes"] > 0 and predicted["roofline_s"]["network"] > 0
