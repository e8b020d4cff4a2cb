"""The base config, and the module that a config imports with `from configs import base`."""

from efficientllm.base_config import get_config, variant

__all__ = ["get_config", "variant"]
