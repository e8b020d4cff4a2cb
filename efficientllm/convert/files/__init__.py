"""File formats of checkpoints: safetensors, GGUF, and folders whose weights are quantized."""
