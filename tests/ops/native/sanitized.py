"""A pytest plugin: the native libraries are those in the folder $SANITIZED_LIBRARY, which test_sanitizers builds."""

import os
import pathlib

from efficientllm.ops import native
from efficientllm.ops.native import matmul


def pytest_configure(config):
    for module in (native, matmul):  # where each looks for its library
        module.__file__ = str(pathlib.Path(os.environ["SANITIZED_LIBRARY"]) / "__init__.py")
    assert native.instruction_sets(), "the library with sanitizers cannot be loaded"
    assert matmul._library() is not None, "the library of matrix products with sanitizers cannot be loaded"
