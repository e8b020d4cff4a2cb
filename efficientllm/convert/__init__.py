"""Checkpoints of others, in both directions.

`open_source(pretrained)` describes a checkpoint and loads it onto shardings; `export(...)` writes a folder that
transformers loads. A family is a description of its config.json and a name table (`families`, `tables`).
"""

from efficientllm.convert.export import convert, export
from efficientllm.convert.source import Source, open_source

__all__ = ["Source", "convert", "export", "open_source"]
