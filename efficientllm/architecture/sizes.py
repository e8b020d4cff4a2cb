"""Named model sizes: layers, widths, heads and vocabulary.

A field that a technique's spec leaves open takes the value of the size's field of the same name. The study's shapes are
Qwen2.5's (arXiv:2412.15115, Table 1; arXiv:2505.13840, Section 4).
"""

import dataclasses
import functools
import typing

from efficientllm.registry import register


@dataclasses.dataclass(frozen=True)
class Size:
    """Shape of a model.

    `hidden` is the width of a dense ffn. `inner` is the width of a mixer without attention; None means twice `dim`.
    A `vocab_size` of None means that of the tokenizer. `patch` is the side of a patch of pictures.
    """

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
    patch: int = None

    def defaults(self) -> dict[str, typing.Any]:
        """Values that specs inherit: all fields, with `rope_base` also as `base` and `norm_eps` also as `eps`."""
        return dataclasses.asdict(self) | {"base": self.rope_base, "eps": self.norm_eps}


def preset(name: str, **shape: typing.Any) -> None:
    """Registers a size under `name`."""
    register("size", name)(functools.partial(Size, **shape))


register("size", "custom")(Size)  # the spec sets every field
preset("nano", num_layers=3, dim=64, num_heads=4, num_kv_heads=2, head_dim=16, hidden=192, rope_base=1e4)
preset("micro", num_layers=4, dim=96, num_heads=6, num_kv_heads=3, head_dim=16, hidden=288, rope_base=1e4)
preset("tiny", num_layers=4, dim=128, num_heads=4, num_kv_heads=2, head_dim=32, hidden=384, rope_base=1e4)
preset("small", num_layers=6, dim=256, num_heads=8, num_kv_heads=4, head_dim=32, hidden=768, rope_base=1e4)

_qwen = {"num_kv_heads": 2, "rope_base": 1e6, "qkv_bias": True, "vocab_size": 151936}
preset("0.5b", num_layers=24, dim=896, num_heads=14, head_dim=64, hidden=4864, **_qwen)
preset("1.5b", num_layers=28, dim=1536, num_heads=12, head_dim=128, hidden=8960, **_qwen)
preset("3b", num_layers=36, dim=2048, num_heads=16, head_dim=128, hidden=11008, **_qwen)

_qwen |= {"head_dim": 128, "vocab_size": 152064}  # these sizes do not tie the output head: config.model.tied = False
preset("7b", **_qwen | {"num_layers": 28, "dim": 3584, "num_heads": 28, "num_kv_heads": 4, "hidden": 18944})
_qwen |= {"num_kv_heads": 8}
preset("14b", num_layers=48, dim=5120, num_heads=40, hidden=13824, **_qwen)
preset("32b", num_layers=64, dim=5120, num_heads=40, hidden=27648, **_qwen)
preset("72b", num_layers=80, dim=8192, num_heads=64, hidden=29568, **_qwen)


def _dit(name, layers, heads, head_dim, *patches):
    """Registers the sizes of DiT (arXiv:2212.09748, Table 1) with these patches; GQA has 4 KV heads, as the study's."""
    dim = heads * head_dim
    kv_heads = 4 if heads % 4 == 0 else 2
    shape = {"num_layers": layers, "dim": dim, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    for patch in patches:
        preset(f"dit_{name}{patch}", **shape, hidden=4 * dim, rope_base=1e4, patch=patch)


# Sizes of Wan 2.1 (arXiv:2503.20314), of layers and a half: self-attention, and cross-attention with an ffn.
_wan = {"rope_base": 1e4, "head_dim": 128, "patch": 2}
preset("wan_1.3b", num_layers=45, dim=1536, num_heads=12, num_kv_heads=12, hidden=8960, **_wan)
preset("wan_14b", num_layers=60, dim=5120, num_heads=40, num_kv_heads=40, hidden=13824, **_wan)


def _sd3(name, layers):
    """Registers the size of a Stable Diffusion 3: as many heads of 64 as layers (arXiv:2403.03206, Section 5.3)."""
    shape = {"num_layers": layers, "dim": 64 * layers, "num_heads": layers, "num_kv_heads": layers, "head_dim": 64}
    preset(name, **shape, hidden=4 * 64 * layers, rope_base=1e4, patch=2)


_sd3("sd3_medium", 24)
_sd3("sd35_medium", 24)
_sd3("sd35_large", 38)

_dit("tiny", 4, 4, 32, 4)
_dit("s", 12, 6, 64, 2)
_dit("b", 12, 12, 64, 2, 4)
_dit("l", 24, 16, 64, 2, 8)
_dit("xl", 28, 16, 72, 2)


def _encoder(name, layers, heads, hidden, vocab_size, norm_eps):
    """Registers the size of a text encoder (`architecture.text_encoders`); no position of theirs is rotary."""
    shape = {"num_layers": layers, "dim": 64 * heads, "num_heads": heads, "num_kv_heads": heads, "head_dim": 64}
    preset(name, **shape, hidden=hidden, rope_base=1e4, norm_eps=norm_eps, vocab_size=vocab_size)


_encoder("clip_l", 12, 12, 3072, 49408, 1e-5)
_encoder("clip_bigg", 32, 20, 5120, 49408, 1e-5)
_encoder("t5_xxl", 24, 64, 10240, 32128, 1e-6)
_encoder("umt5_xxl", 24, 64, 10240, 256384, 1e-6)
