"""Folder of the user's cache: data, measurements of this machine, and compiled programs."""

import os
import pathlib

from efficientllm.typing import PathLike

VARIABLE = "EFFICIENTLLM_CACHE"
PROGRAMS = "EFFICIENTLLM_COMPILE_CACHE"  # "off" in the environment of runs whose compilation is compared


def folder(path: PathLike | None = None) -> pathlib.Path:
    """Returns `path`, else $EFFICIENTLLM_CACHE, else ~/.cache/efficientllm."""
    return pathlib.Path(path or os.environ.get(VARIABLE) or "~/.cache/efficientllm").expanduser()
