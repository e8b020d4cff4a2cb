"""Ahead-of-time compilation for absent hardware: chosen kernels and collectives. Needs plugins but no devices."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

import runs

PLUGINS = {"tpu": "libtpu", "gpu": "jax_cuda13_plugin"}


def compiled(target, *what, script="ahead.py"):
    """What the script prints, from a process of its own: a plugin must be found before JAX starts."""
    plugin = PLUGINS[target]
    if importlib.util.find_spec(plugin) is None:
        pytest.skip(f"{plugin} is not installed: pip install -e '.[{target}]'")
    argv = [sys.executable, str(runs.ROOT / "tests" / "ops" / script), target, *what]
    environment = {**os.environ, "PYTHONPATH": str(runs.ROOT)}
    done = subprocess.run(argv, cwd=runs.ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mixer", ["gqa", "window(window=100)", "mla"])
def test_tpus_run_attention_in_the_splash_kernel(mixer):
    report = compiled("tpu", mixer)
    assert report["used"]["attention"] == ["splash"] and report["calls"] == ["tpu_custom_call"]


@pytest.mark.parametrize("mixer", ["gqa", "window(window=100)", "mla"])
def test_gpus_run_attention_in_cudnn(mixer):
    report = compiled("gpu", mixer)
    assert report["used"]["attention"] == ["cudnn"] and report["calls"] == ["__cudnn$fmha"]


@pytest.mark.parametrize("mesh", ["data=1", "data=2, tensor=4"])
@pytest.mark.parametrize("target", PLUGINS)
def test_int4_is_never_decompressed_in_memory(target, mesh):
    """No array of floats as large as some kernel, neither in prefill nor in decoding; nf4, which XLA multiplies, has
    one."""
    report = compiled(target, "int4(group=64)", mesh, script="ahead_rounded.py")
    assert report["used"]["matmul_int4"] == ["pallas"] and report["floats"] == {"prefill": [], "decode": []}
    by_xla = compiled(target, "nf4", mesh, script="ahead_rounded.py")
    assert by_xla["used"]["matmul_nf4"] == ["xla"] and by_xla["floats"]["prefill"] and by_xla["floats"]["decode"]


EXPERTS = {  # elements of the largest array that a token gathers: vectors, or the bytes of a kernel of all experts
    ("data=1", 704): 0,
    ("data=2, tensor=4", 768): 8 * 1024,
    ("data=2, tensor=4", 704): 6 * 704 * 1024 // 2,  # 22 groups, which four devices cannot divide
    ("fsdp=8", 704): 6 * 704 * 1024 // 2,
}


@pytest.mark.parametrize("mesh, hidden", EXPERTS)
@pytest.mark.parametrize("target", PLUGINS)
def test_int4_experts_are_multiplied_compressed_on_every_mesh(target, mesh, hidden):
    ffn = f"moe(num_experts=6, top_k=2, hidden={hidden})"
    report = compiled(target, "int4(group=32)", mesh, ffn, script="ahead_rounded.py")
    assert report["used"]["matmul_int4"] == ["pallas"] and report["floats"]["decode"] == []
    assert report["gathered"]["decode"] <= EXPERTS[mesh, hidden]


@pytest.mark.parametrize("target", PLUGINS)
@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_a_token_is_looked_up_where_its_row_lies(target, form):
    """No table is gathered for the token of one prompt, as the partitioner does by itself on GPUs; vectors are."""
    report = compiled(target, form, "tensor=8", script="ahead_rounded.py")
    assert report["gathered"]["decode"] < 8 * 1024


def test_gpus_convert_int8_where_they_multiply_it():
    """No kernel is scaled and written to memory first: what it then takes is what bfloat16 takes."""
    int8, bfloat16 = (compiled("gpu", form, "data=1", script="ahead_rounded.py") for form in ("int8", "bfloat16"))
    assert int8["used"]["matmul_int8"] == ["xla"]
    assert int8["temporaries"]["prefill"] < 1.2 * bfloat16["temporaries"]["prefill"]


def test_gpus_do_not_put_kernels_side_by_side_for_every_prompt():
    """XLA multiplies gate and up as one, which would copy both first."""
    assert compiled("gpu", "bfloat16", "data=1", script="ahead_rounded.py")["side_by_side"] == []


def test_a_step_on_a_gpu_moves_few_bytes():
    """Bytes a logit: stored, read for their sum and for their gradient, which is stored and read by two products."""
    report = compiled("gpu", script="ahead_bytes.py")
    default, loop, everything = (report[name] for name in ("default", "loop", "everything"))
    assert default["all"] < 0.95 * loop["all"] and loop["all"] < 0.95 * everything["all"], report
    assert default["peak"] < everything["peak"]
    head = 4 + 2 + 3 * 2 + 3 * 4  # rounded, read by products, and its gradient from zeros
    assert default["loss"] < 1.1 * (6 * 2 * report["logits"] + head * report["head"]), report
