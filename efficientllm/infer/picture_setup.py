"""Setup of requests for pictures: their prompts, their size in pixels and in latents, and the autoencoder's fit."""

import dataclasses
import typing

from efficientllm.autoencoders.check_fit import check_autoencoder
from efficientllm.embeds.patches import Denoiser
from efficientllm.errors import UserError
from efficientllm.infer.text_to_image_prompts import PicturePrompts, open_prompts
from efficientllm.run_description import RunDescription


def of_requests(description: RunDescription) -> tuple[PicturePrompts | None, RunDescription]:
    """Reads what a config wants of pictures -> its prompts, or None, and the description of the model for them.

    Raises UserError for what does not fit the model.
    """
    description.objective.check(description.outline)  # which also says that it is a model of pictures
    prompts = open_prompts(description)
    if prompts is None:
        if description.config.infer.offload:
            raise UserError(
                "config.infer.offload = True: there are no parts that are needed in turn without prompts; leave it "
                "out, or set config.text_states"
            )
        return None, with_size(description)
    check_autoencoder(description.outline, description.autoencoder, description.autoencoder_spec)
    embed = with_size(description).embed | {"text_length": prompts.shape.tokens}
    return prompts, dataclasses.replace(description, embed=embed)


def with_size(description: RunDescription) -> RunDescription:
    """Returns the description of the model for pictures of `config.infer.size`; prompts are not read.

    Raises UserError for a size that does not fit.
    """
    if not (size := description.config.infer.size):
        return description
    _check_any_size(description, size)
    fields = {"side": 0, "size": latent_size(size, description.outline, description.autoencoder)}
    return dataclasses.replace(description, embed=fields)


def _check_any_size(description, size):
    if not description.outline.any_size:
        usual = " x ".join(map(str, description.outline.size))
        raise UserError(
            f"config.infer.size = {size}: the model samples what it was trained on, {usual}, alone; leave it out"
        )


def latent_size(size: tuple[int, ...], model: Denoiser, encoder: typing.Any) -> tuple[int, ...]:
    """Converts the `size` of pictures, in pixels and frames, to that of what `model` samples.

    `encoder` is the autoencoder, or None for a model of pixels. Raises UserError for a model of other pictures, for
    sides that are no whole patches, and for frames that are not 1 + a multiple of the autoencoder's factor.
    """
    where = f"config.infer.size = {size}"
    if len(size) != len(model.size):
        names = "(frames, height, width)" if len(model.size) == 3 else "(height, width)"
        raise UserError(f"{where}: the model samples {'clips' if len(model.size) == 3 else 'pictures'}; give {names}")
    factor = 1 if encoder is None else encoder.factor
    multiple = factor * model.patch * model.tile
    if any(side % multiple for side in size[-2:]):
        nearest = (*size[:-2], *(max(multiple, round(side / multiple) * multiple) for side in size[-2:]))
        raise UserError(
            f"{where}: height and width must be multiples of {multiple}, a patch of the model; take {nearest}"
        )
    return *_latent_frames(size[:-2], encoder, where), *(side // factor for side in size[-2:])


def _latent_frames(frames, encoder, where):
    factor = None if encoder is None else encoder.frame_factor
    if not frames or factor is None:
        return frames
    (count,) = frames
    if (count - 1) % factor:
        lower = (count - 1) // factor * factor + 1
        raise UserError(
            f"{where}: a clip has 1 frame more than a multiple of {factor}; take {lower} or {lower + factor} frames"
        )
    return (1 + (count - 1) // factor,)
