"""Check that an autoencoder's latents are those that a diffusion model samples."""

import typing

from efficientllm.embeds.patches import Denoiser
from efficientllm.errors import UserError


def check_autoencoder(model: Denoiser, encoder: typing.Any, spec: str) -> None:
    """Raises UserError unless what `model` samples becomes pictures: by `encoder`, or as it is.

    `spec` is that of the autoencoder. Its tensors are compared with its config.json.
    """
    where = f"config.autoencoder = {spec!r}"
    if encoder is None:
        if model.channels not in (1, 3):
            raise UserError(
                f"{where}: the model samples latents of {model.channels} channels, and no autoencoder decodes them; "
                "name the folder of one, kl(path=FOLDER) or wan(path=FOLDER), or a pipeline with a vae"
            )
        return
    if encoder.channels != model.channels:
        raise UserError(
            f"{where}: its latents have {encoder.channels} channels, and the model samples {model.channels}: it is "
            "that of another model; name the model's own"
        )
    is_of_clips = len(model.size) == 3
    if is_of_clips != (encoder.frame_factor is not None):
        sampled, decoded = ("clips", "pictures") if is_of_clips else ("pictures", "clips")
        raise UserError(f"{where}: the model samples {sampled}, and it decodes {decoded}; name the model's own")
    try:
        encoder.check_files()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
