"""A pytest plugin: the native library is the one in the folder $SANITIZED_LIBRARY, which test_sanitizers builds."""

import os
import pathlib

from efficientllm.ops import native


def pytest_configure(config):
    native.__file__ = str(pathlib.Path(os.environ["SANITIZED_LIBRARY"]) / "__init__.py")  # where it looks for it
    assert native.instruction_sets(), "the library with sanitizers cannot be loaded"
