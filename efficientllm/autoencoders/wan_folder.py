"""Reader of an AutoencoderKLWan's diffusers folder: config.json and the names of its tensors."""

import dataclasses
import re
import typing

from efficientllm.autoencoders.folder import (
    MOST_LAYERS,
    MOST_LEVELS,
    WIDEST,
    Leaves,
    make_leaves,
    take_bounded,
    take_list,
)
from efficientllm.autoencoders.wan_network import WanShape
from efficientllm.convert.hf_config.checked_keys import CheckedKeys
from efficientllm.errors import UserError, short_repr
from efficientllm.registry.ranges import FINITE, POSITIVE
from efficientllm.typing import Params, PathLike

# Parts of our parameter paths in the names of diffusers; the first that matches.
_NAMES = (
    (r"^(encoder|decoder)/quant/", lambda match: "quant_conv." if match[1] == "encoder" else "post_quant_conv."),
    (r"^decoder/level_(\d+)/", r"decoder.up_blocks.\1."),
    (r"/mid/", ".mid_block."),
    (r"resnet_(\d+)/", r"resnets.\1."),
    (r"attention/qkv/", "attentions.0.to_qkv."),
    (r"attention/o/", "attentions.0.proj."),
    (r"attention/norm/", "attentions.0.norm."),
    (r"shortcut/", "conv_shortcut."),
    (r"resample/conv/", "resample.1."),
    (r"time/", "time_conv."),
    (r"kernel$", "weight"),
    (r"scale$", "gamma"),
    (r"/", "."),
)


@dataclasses.dataclass(frozen=True)
class Description:
    """A config.json: the network, and how latents are scaled, `(z - mean) / std` of each channel."""

    shape: WanShape
    means: tuple[float, ...]
    stds: tuple[float, ...]


def describe_config(config: dict[str, typing.Any], where: PathLike, precision: str) -> Description:
    """Describes a config.json (a dict). Raises UserError naming a key that cannot be honoured."""
    keys = CheckedKeys(config, where)
    base = take_bounded(keys, "base_dim", WIDEST)
    decoder_base = keys.number("decoder_base_dim", default=None) or base
    factors = _factors(keys)
    widths, decoder_widths = (tuple(width * factor for factor in factors) for width in (base, decoder_base))
    halved = take_list(keys, "temperal_downsample", len(widths) - 1, _is_flag, "times true or false, one for a level")
    shape = WanShape(
        widths,
        decoder_widths,
        take_bounded(keys, "num_res_blocks", MOST_LAYERS),
        halved,
        take_bounded(keys, "z_dim", WIDEST),
        take_bounded(keys, "in_channels", WIDEST),
        take_bounded(keys, "out_channels", WIDEST),
        precision,
    )
    _check_widths(keys, shape)
    keys.expect("attn_scales", [], because="the one attention is in the middle")
    keys.expect("is_residual", False, because="levels of Wan 2.2 have other shortcuts")
    keys.expect("patch_size", 1, because="clips are not cut into patches")
    for name in ("dropout", "scale_factor_temporal", "scale_factor_spatial"):  # of training, and of pipelines
        keys.take(name, default=None)
    means = take_list(keys, "latents_mean", shape.latent_channels, _is_in(FINITE), "numbers, one for a channel")
    stds = take_list(keys, "latents_std", shape.latent_channels, _is_in(POSITIVE), "positive numbers")
    keys.finish()
    return Description(shape, means, stds)


def _factors(keys):
    factors = keys.take("dim_mult")
    right = isinstance(factors, list | tuple) and 0 < len(factors) <= MOST_LEVELS
    if not right or not all(type(factor) is int and 0 < factor <= WIDEST for factor in factors):
        raise UserError(
            f"{keys.where}: dim_mult = {short_repr(factors)}: must be whole multiples of base_dim, of 1 to "
            f"{MOST_LEVELS} levels"
        )
    return factors


def _check_widths(keys, shape):
    for width in (*shape.widths, *shape.decoder_widths):
        if width > WIDEST:
            raise UserError(f"{keys.where}: a level of {width:,} channels: must be at most {WIDEST:,}")
    for width in shape.decoder_widths[1:]:
        if width % 2:
            raise UserError(f"{keys.where}: a level of {width} channels: must be even, which upsampling halves")


def _is_flag(value):
    return isinstance(value, bool)


def _is_in(allowed):
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and value in allowed


def leaves_of(params: Params, layers: int) -> Leaves:
    """`{path: Leaf}` of abstract parameters; `layers` are the residual blocks of a level of the encoder."""
    return make_leaves(params, lambda path: disk_name(path, layers), _layout)


def _layout(path, shape):
    """Kernels of frames and of pictures, products, and scales of clips and of pictures, where attention is."""
    is_picture = "/attention/" in path
    if path.endswith("bias"):
        return "same"
    if len(shape) > 2:
        return "conv_3d" if len(shape) == 5 else "conv"
    return "pointwise" if is_picture else "pointwise_3d"


def disk_name(path: str, layers: int) -> str:
    """The tensor that holds a parameter: `encoder/level_1/resnet_0/conv1/kernel` is
    `encoder.down_blocks.3.conv1.weight` where a level has two residual blocks and a resampling."""

    def place(match):
        index = layers if match[2] in ("resample", "time") else int(match[2].removeprefix("resnet_"))
        name = {"resample": "resample/", "time": "time/"}.get(match[2], "")
        return f"encoder.down_blocks.{int(match[1]) * (layers + 1) + index}.{name}"

    path = re.sub(r"^encoder/level_(\d+)/(resnet_\d+|resample|time)/", place, path)
    path = re.sub(r"^decoder/level_(\d+)/(resample|time)/", r"decoder/level_\1/upsamplers.0.\2/", path)
    for pattern, name in _NAMES:
        path = re.sub(pattern, name, path)
    return path
