"""What is chosen and compiled for hardware that is not here. Each needs the platform's plugin, none needs a device."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

import runs


def compiled(target, mixer, plugin):
    """What ahead.py prints, from a process of its own: a plugin must be found before JAX starts."""
    if importlib.util.find_spec(plugin) is None:
        pytest.skip(f"{plugin} is not installed: pip install 'efficientllm[{target}]'")
    argv = [sys.executable, str(runs.ROOT / "tests" / "ahead.py"), target, mixer]
    environment = {**os.environ, "PYTHONPATH": str(runs.ROOT)}
    done = subprocess.run(argv, cwd=runs.ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mixer", ["gqa", "window(window=100)", "mla"])
def test_tpus_run_attention_in_the_splash_kernel(mixer):
    found = compiled("tpu", mixer, "libtpu")
    assert found["used"]["attention"] == ["splash"] and found["calls"] == ["tpu_custom_call"]


@pytest.mark.parametrize("mixer", ["gqa", "window(window=100)", "mla"])
def test_gpus_run_attention_in_cudnn(mixer):
    found = compiled("gpu", mixer, "jax_cuda13_plugin")
    assert found["used"]["attention"] == ["cudnn"] and found["calls"] == ["__cudnn$fmha"]
