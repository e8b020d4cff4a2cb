"""Checkpoint conversion: reading and writing Hugging Face, GGUF, PEFT and quantized checkpoints.

`open_source(pretrained)` describes a checkpoint and loads it onto shardings. `export(...)` writes a folder that
transformers loads; `convert(source, folder)` does so directly from a checkpoint. A family is a description of its
config.json and a tensor name table (`hf_config.families`, `tensors.name_tables`).
"""

import importlib

# The package is imported to answer --help too, which needs no jax.
_HOMES = {"Source": "source", "open_source": "resolve", "convert": "write", "export": "write", "merge_into": "merge"}
__all__ = sorted(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
