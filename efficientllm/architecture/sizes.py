"""Model shapes by name. A technique inherits what it needs by the name of its field, unless its spec says otherwise.

The study's shapes are Qwen2.5's (arXiv:2412.15115, Table 1; arXiv:2505.13840, Section 4).
"""

import dataclasses
import functools

from efficientllm.registry import register


@dataclasses.dataclass(frozen=True)
class Size:
    """`hidden` is the width of a dense ffn, `inner` that of a mixer without attention (None: twice `dim`);
    `vocab_size` None means the tokenizer's."""

    num_layers: int
    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    rope_base: float
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    vocab_size: int = None
    inner: int = None

    def defaults(self):
        """What specs may inherit: the shape's own fields, and the names other techniques give two of them."""
        return dataclasses.asdict(self) | {"base": self.rope_base, "eps": self.norm_eps}


def preset(name, **shape):
    """Registers a shape under `name`."""
    register("size", name)(functools.partial(Size, **shape))


register("size", "custom")(Size)  # every field of one's own
preset("tiny", num_layers=4, dim=128, num_heads=4, num_kv_heads=2, head_dim=32, hidden=384, rope_base=1e4)
preset("small", num_layers=6, dim=256, num_heads=8, num_kv_heads=4, head_dim=32, hidden=768, rope_base=1e4)

_qwen = {"num_kv_heads": 2, "rope_base": 1e6, "qkv_bias": True, "vocab_size": 151936}
preset("0.5b", num_layers=24, dim=896, num_heads=14, head_dim=64, hidden=4864, **_qwen)
preset("1.5b", num_layers=28, dim=1536, num_heads=12, head_dim=128, hidden=8960, **_qwen)
preset("3b", num_layers=36, dim=2048, num_heads=16, head_dim=128, hidden=11008, **_qwen)

_qwen |= {"head_dim": 128, "vocab_size": 152064}  # their heads are not tied: config.model.tied = False
preset("7b", **_qwen | {"num_layers": 28, "dim": 3584, "num_heads": 28, "num_kv_heads": 4, "hidden": 18944})
_qwen |= {"num_kv_heads": 8}
preset("14b", num_layers=48, dim=5120, num_heads=40, hidden=13824, **_qwen)
preset("32b", num_layers=64, dim=5120, num_heads=40, hidden=27648, **_qwen)
preset("72b", num_layers=80, dim=8192, num_heads=64, hidden=29568, **_qwen)
