"""Test session: eight simulated CPU devices, an own cache folder, and the options of the contract and fuzz tests.

On a machine with a GPU, tests whose subject is one device run there too: JAX_PLATFORMS=cuda pytest tests/quant.
"""

import atexit
import contextlib
import os
import pathlib
import re
import shutil
import stat
import tempfile

import pytest

if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_force_host_platform_device_count=8"
        # Programs of tests run once: compiling them takes longer than running them.
        + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    )
else:  # a share of the GPU for each worker, and float32 products as tests bound them
    os.environ |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# Not the user's cache. Workers and the processes that tests start share it.
if "EFFICIENTLLM_CACHE" not in os.environ:
    os.environ["EFFICIENTLLM_CACHE"] = tempfile.mkdtemp(prefix="efficientllm-cache-")
    atexit.register(shutil.rmtree, os.environ["EFFICIENTLLM_CACHE"], ignore_errors=True)


def _compilation_cache():
    """A compilation cache that outlives the session. It must be writable by the user alone: its programs are run."""
    folder = pathlib.Path(tempfile.gettempdir()) / f"efficientllm-tests-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
            folder.chmod(0o700)
            return folder
    return pathlib.Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))


# A program that one test has compiled is not compiled again by the next, nor by the processes that tests start.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_compilation_cache())
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"


def pytest_addoption(parser):
    parser.addoption("--imports", default="", help="files of your own techniques, for the contract suite: a.py,b.py")
    parser.addoption("--fuzz-seconds", type=float, default=0.0, help="time of each fuzz test of the slow tier")


@pytest.fixture
def fuzz_seconds(request):
    """What `--fuzz-seconds` gives each fuzzer of the slow tier, 0 without it."""
    return request.config.getoption("--fuzz-seconds")


def pytest_configure(config):
    if names := config.getoption("--imports"):
        from efficientllm.registry.plugins import import_plugins

        import_plugins(names.split(","))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skips a test that needs more GPUs than the machine has. The simulated CPU devices are always enough."""
    from efficientllm.errors import UserError

    try:
        return (yield)
    except UserError as error:
        if os.environ["JAX_PLATFORMS"] != "cpu" and re.search(r"needs \d+ devices; there (are|is) \d", str(error)):
            pytest.skip(str(error))
        raise
