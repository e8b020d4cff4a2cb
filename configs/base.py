"""The base config as it is, and where configs that say `from configs import base` find it."""

from efficientllm.base_config import get_config, variant

__all__ = ["get_config", "variant"]
