"""The native code under AddressSanitizer and UBSan: its own tests, of shapes that fit and of many that do not."""

import os
import pathlib
import shutil
import subprocess
import sys

import jaxlib
import pytest

ROOT = pathlib.Path(__file__).parents[3]
TESTS = [
    "tests/ops/native/test_shapes.py",
    "tests/ops/native/test_attention.py",
    "tests/ops/native/test_head_products.py",
    "tests/ops/native/test_matmul.py",
    "tests/ops/native/test_flash.py",
    "tests/quant/test_forms.py::test_native_products",
]
LIBRARIES = {  # of setup.py
    "products": ("products.cc", "attention.cc", "head_products.cc"),
    "matmul": ("matmul.cc", "matmul_kernels.cc", "flash.cc", "flash_kernels.cc"),
}
FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1"]
OVERRUN = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.overrun.restype = ctypes.c_int
print(library.overrun(int(sys.argv[2])))
"""

pytestmark = pytest.mark.slow


def compiler():
    path = shutil.which("g++")
    if path is None:
        pytest.skip("no g++")
    return path


def build(sources, library, *flags):
    command = [compiler(), "-shared", "-fPIC", "-std=c++17", *FLAGS, *flags, *map(str, sources), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def environment(**more):
    """What makes a Python that is not built with sanitizers load libraries that are."""
    runtimes = [
        subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return (
        os.environ
        | more
        | {
            "LD_PRELOAD": " ".join(runtimes),
            "PYTHONMALLOC": "malloc",  # each object with a border of its own
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=97",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:exitcode=97",
            "PYTHONPATH": str(ROOT),
        }
    )


def test_native_code_is_clean_under_sanitizers(tmp_path):
    native = ROOT / "efficientllm" / "ops" / "native"
    headers = pathlib.Path(jaxlib.__file__).parent / "include"
    for library, names in LIBRARIES.items():
        build([native / name for name in names], tmp_path / f"_{library}_sanitized.so", f"-I{headers}", "-w")
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "ops.native.sanitized", *TESTS]
    environ = environment(SANITIZED_LIBRARY=str(tmp_path))
    environ["PYTHONPATH"] += f"{os.pathsep}{ROOT / 'tests'}"
    # Minutes: compiling takes the most.
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    assert "[100%]" in done.stdout and "runtime error" not in done.stderr


@pytest.mark.parametrize("index, status", [(3, 0), (4, 97), (-1, 97)])
def test_the_sanitizers_are_awake(index, status, tmp_path):
    """A library that reads past an array is caught by the same way of running it."""
    (tmp_path / "overrun.cc").write_text(
        'extern "C" int overrun(int i) { int* a = new int[4]{1, 2, 3, 4}; int v = a[i]; delete[] a; return v; }'
    )
    build([tmp_path / "overrun.cc"], tmp_path / "overrun.so")
    command = [sys.executable, "-c", OVERRUN, str(tmp_path / "overrun.so"), str(index)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == status, done.stderr[-2000:]
    assert any(message in done.stderr for message in ("heap-buffer-overflow", "runtime error")) == (status != 0)
