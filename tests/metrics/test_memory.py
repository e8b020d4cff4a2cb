import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from efficientllm.metrics import memory

pytestmark = pytest.mark.quick

PEAK = """
import jax
from efficientllm.metrics import host, memory
before = host.rss_bytes()
block = bytearray(b"x") * (96 << 20)
del block
after = host.rss_bytes()
print(before, after, memory.peak_bytes(jax.local_devices(), before).value)
"""


def test_peak_on_a_cpu_is_a_kernel_counter_not_the_larger_of_two_looks():
    out = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True).stdout
    before, after, peak = map(int, out.split())
    assert after - before < 60 << 20, "the block was given back before the second look"
    assert (95 << 20) < peak < (130 << 20)


def test_peak_is_null_with_a_reason_where_it_was_not_prepared():
    reading = memory.peak_bytes(jax.local_devices())
    assert reading.value is None and "not recorded" in reading.reason


def test_peak_of_accelerators_is_summed_from_their_allocators():
    def device(stats):
        return types.SimpleNamespace(platform="gpu", device_kind="X", memory_stats=lambda: stats)

    assert memory.peak_bytes([device({"peak_bytes_in_use": 5}), device({"peak_bytes_in_use": 7})]).value == 12
    assert memory.peak_bytes([device({"peak_bytes_in_use": 5}), device(None)]).value is None


def test_compiled_memory_counts_arguments_and_aliases():
    x = jnp.ones((256, 256), jnp.float32)
    plain = memory.compiled_memory(jax.jit(lambda a, b: a @ b).lower(x, x).compile())
    assert plain["argument_bytes"] == 2 * x.nbytes and plain["output_bytes"] == x.nbytes
    donated = memory.compiled_memory(jax.jit(lambda a: a + 1, donate_argnums=0).lower(x).compile())
    assert donated["alias_bytes"] == x.nbytes
    assert donated["total_bytes"] == x.nbytes + donated["temp_bytes"] + donated["generated_code_bytes"]


def test_int4_arguments_take_half_a_byte_an_element():
    weights = jax.ShapeDtypeStruct((512, 512), jnp.int4)
    compiled = jax.jit(lambda w: w.astype(jnp.float32).sum()).lower(weights).compile()
    assert memory.compiled_memory(compiled)["argument_bytes"] == 512 * 512 // 2


@pytest.mark.parametrize(
    "variables, on",
    [
        ({}, True),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, False),
        ({"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}, False),
    ],
)
def test_preallocation(monkeypatch, variables, on):
    for name in memory.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    gpu = types.SimpleNamespace(platform="gpu")
    assert memory.allocator_settings([gpu])["preallocates"] is on
    assert not memory.preallocates(jax.local_devices())
