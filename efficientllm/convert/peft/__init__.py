"""Adapters as folders that peft reads and writes: adapter_config.json and adapter_model.safetensors.

`write` makes one of what was tuned, `around` puts one around a checkpoint's parameters. peft adapts a module of
transformers; where that holds several kernels of ours in one tensor, one adapter of peft's is the adapters of all of
them.
"""

from efficientllm.convert.peft.adapter_config import CONFIG, is_writable, read_spec
from efficientllm.convert.peft.read import PREFIX, TENSORS, around
from efficientllm.convert.peft.write import write

__all__ = ["CONFIG", "PREFIX", "TENSORS", "around", "is_writable", "read_spec", "write"]
