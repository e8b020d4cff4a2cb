"""The comparison with transformers does what it says: equal work, every number in the file."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from convert import folders

REPOSITORY = pathlib.Path(__file__).parents[1]
PEER = REPOSITORY / "third_party" / "transformers"


@pytest.fixture(scope="module")
def compare():
    """The script as a module: its folder is no package (it would be called `transformers`)."""
    sys.path.insert(0, str(PEER))
    try:
        spec = importlib.util.spec_from_file_location("peer_compare", PEER / "compare.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(PEER))


@pytest.mark.slow  # imports torch and jax in three processes, and compiles two steps
def test_equal_work(tmp_path):
    pytest.importorskip("torch")
    output = tmp_path / "found.json"
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    command = [sys.executable, str(PEER / "compare.py"), "--shape=tiny", "--steps=2", "--batch=2", "--length=16"]
    done = subprocess.run([*command, f"--json={output}"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    losses = report["first_loss_nats"]
    assert abs(losses["torch-float32"] - losses["ours-float32"]) < 1e-4
    assert losses["ours-mixed"] != losses["ours-float32"]  # the precision reached the model
    assert abs(losses["ours-mixed"] - losses["ours-float32"]) < 0.05
    # Three updates later: the optimisers do the same too.
    torch_curve, our_curve = (report["losses_nats"][name] for name in ("torch-float32", "ours-float32"))
    assert len(torch_curve) == len(our_curve) == 3
    assert max(abs(a - b) for a, b in zip(torch_curve, our_curve, strict=True)) < 1e-4
    for name in ("torch-float32", "ours-float32", "ours-mixed"):
        assert len(report["step_s"][name]) == len(report["step_cpu_s"][name]) == 2
        assert all(seconds > 0 for seconds in report["step_s"][name])
        assert report["speed_ratios"][name]["low"] <= report["speed_ratios"][name]["ratio"]
    assert report["provenance"]["torch"] and report["provenance"]["jax"]
    assert "ours-float32" in done.stdout


def test_unequal_work_is_refused(compare):
    assert compare.check_first_losses({"torch-float32": 2.0, "ours-float32": 2.00005, "ours-mixed": 2.3}) > 0
    with pytest.raises(RuntimeError, match="differ by 2.00e-04"):
        compare.check_first_losses({"torch-float32": 2.0, "ours-float32": 2.0002})


@pytest.mark.slow  # the same, served
def test_served_tokens_are_the_same(tmp_path):
    pytest.importorskip("torch")
    folders.llama(tmp_path / "model", vocab_size=300)
    output = tmp_path / "found.json"
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    command = [sys.executable, str(PEER / "serve.py"), f"--model={tmp_path / 'model'}", "--prefill=40", "--new=6"]
    command += ["--blocks=2", "--contestants=transformers float32;ours float32;ours int8", f"--json={output}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    # serve.py itself refuses tokens that differ in float32.
    assert report["ours float32"]["tokens"] == report["transformers float32"]["tokens"]
    for result in report.values():
        assert len(result["tokens"]) == 6 and len(result["prefill_s"]) == len(result["token_s"]) == 2
    assert "| ours int8 |" in done.stdout
