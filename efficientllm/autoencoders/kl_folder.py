"""Reader of an AutoencoderKL's diffusers folder: config.json and the names of its tensors."""

import dataclasses
import pathlib
import re
import typing

from efficientllm.autoencoders.folder import MOST_LAYERS, MOST_LEVELS, WIDEST, Leaves, make_leaves, take_bounded
from efficientllm.autoencoders.kl_network import KLShape
from efficientllm.convert.files.safetensors_file import SafetensorsFolder
from efficientllm.convert.hf_config.checked_keys import CheckedKeys
from efficientllm.convert.tensors.headless_names import RenamedTensors
from efficientllm.convert.tensors.tensor_reader import TensorReader
from efficientllm.errors import UserError, short_repr
from efficientllm.typing import Params, PathLike

# Parts of our parameter paths in the names of diffusers; the first that matches.
_NAMES = (
    (r"^(encoder|decoder)/quant/", lambda match: "quant_conv." if match[1] == "encoder" else "post_quant_conv."),
    (r"^encoder/level_(\d+)/", r"encoder.down_blocks.\1."),
    (r"^decoder/level_(\d+)/", r"decoder.up_blocks.\1."),
    (r"/mid/", ".mid_block."),
    (r"/norm_out/", ".conv_norm_out."),
    (r"resnet_(\d+)/", r"resnets.\1."),
    (r"attention/norm/", "attentions.0.group_norm."),
    (r"attention/([qkv])/", r"attentions.0.to_\1."),
    (r"attention/o/", "attentions.0.to_out.0."),
    (r"shortcut/", "conv_shortcut."),
    (r"downsample/", "downsamplers.0.conv."),
    (r"upsample/", "upsamplers.0.conv."),
    (r"(kernel|scale)$", "weight"),
    (r"/", "."),
)
_OLDER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.17


@dataclasses.dataclass(frozen=True)
class Description:
    """A config.json: the network, and how latents are scaled, `(z - shift) * scale`."""

    shape: KLShape
    scale: float
    shift: float


def describe_config(config: dict[str, typing.Any], where: PathLike, precision: str) -> Description:
    """Describes a config.json (a dict). Raises UserError naming a key that cannot be honoured."""
    keys = CheckedKeys(config, where)
    widths = _widths(keys)
    shape = KLShape(
        widths,
        take_bounded(keys, "layers_per_block", MOST_LAYERS),
        take_bounded(keys, "latent_channels", WIDEST),
        take_bounded(keys, "in_channels", WIDEST),
        take_bounded(keys, "out_channels", WIDEST),
        take_bounded(keys, "norm_num_groups", WIDEST),
        *(_flag(keys, name) for name in ("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv")),
        precision,
    )
    for width in widths:
        if width % shape.groups:
            raise UserError(f"{where}: norm_num_groups = {shape.groups} does not divide block_out_channels = {width}")
    for name, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        keys.expect(name, [block] * len(widths), because=f"known is {block} for each of {len(widths)} levels")
    keys.expect("act_fn", "silu", "swish", because="the activation of ours is silu")
    for name in ("latents_mean", "latents_std"):
        keys.expect(name, because="latents have one scaling_factor and one shift_factor")
    scale, shift = keys.number("scaling_factor", kind=float), keys.take("shift_factor", default=0.0)
    if isinstance(shift, bool) or not isinstance(shift, int | float):
        raise UserError(f"{where}: shift_factor = {short_repr(shift)}: must be a number")
    for name in ("sample_size", "force_upcast"):  # of tiles, and of float16
        keys.take(name, default=None)
    keys.finish()
    return Description(shape, scale, shift)


def _widths(keys):
    widths = keys.take("block_out_channels")
    right = isinstance(widths, list | tuple) and 0 < len(widths) <= MOST_LEVELS
    if not right or not all(type(width) is int and 0 < width <= WIDEST for width in widths):
        raise UserError(
            f"{keys.where}: block_out_channels = {short_repr(widths)}: must be widths of 1 to {MOST_LEVELS} levels"
        )
    return tuple(widths)


def _flag(keys, name):
    value = keys.take(name)
    if not isinstance(value, bool):
        raise UserError(f"{keys.where}: {name} = {short_repr(value)}: must be true or false")
    return value


def open_tensors(folder: pathlib.Path) -> TensorReader:
    """Opens the folder's safetensors, with the attention's older names renamed."""
    tensors = SafetensorsFolder(folder)
    names = {_newer_name(name): name for name in tensors.shapes}
    return RenamedTensors(tensors, names) if any(new != old for new, old in names.items()) else tensors


def _newer_name(name):
    head, attention, rest = name.partition("mid_block.attentions.0.")
    prefix, dot, leaf = rest.rpartition(".")
    return f"{head}{attention}{_OLDER_NAMES.get(prefix, prefix)}{dot}{leaf}" if attention else name


def leaves_of(params: Params) -> Leaves:
    """`{path: Leaf}` of abstract parameters."""
    return make_leaves(params, disk_name, _layout)


def _layout(path, shape):
    if not path.endswith("kernel"):
        return "same"
    is_pointwise = "/shortcut/" in path or "/quant/" in path
    return "conv" if len(shape) == 4 else "pointwise" if is_pointwise else "rows"


def disk_name(path: str) -> str:
    """The tensor that holds a parameter: `encoder/level_0/resnet_1/conv1/kernel` is
    `encoder.down_blocks.0.resnets.1.conv1.weight`."""
    for pattern, name in _NAMES:
        path = re.sub(pattern, name, path)
    return path
