"""PEFT adapter folders, read and written: adapter_config.json and adapter_model.safetensors.

`write` saves tuned adapters, `around` wraps a checkpoint's kernels in saved ones. PEFT adapts modules of transformers;
where one such tensor holds several of our kernels (fused projections), one PEFT adapter holds the adapters of all.
"""

from efficientllm.convert.peft.adapter_config import CONFIG, is_writable, read_spec
from efficientllm.convert.peft.read import PREFIX, TENSORS, around
from efficientllm.convert.peft.write import write

__all__ = ["CONFIG", "PREFIX", "TENSORS", "around", "is_writable", "read_spec", "write"]
