"""Comparison of a vision-language model's logits here and in transformers, on pictures that are drawn here."""

import importlib.util
import typing
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from efficientllm import model
from efficientllm.convert import check_internvl, reference_errors
from efficientllm.convert.source import Source
from efficientllm.embeds.vision_language import VisionLM
from efficientllm.errors import UserError
from efficientllm.runtime import optional_packages
from efficientllm.vision.processors import Processor, read_processor
from efficientllm.vision.token_rows import Prompt, PromptBatch, make_batch
from efficientllm.vision.tower_rows import PreparedImage

WORDS = 8  # random tokens between pictures


def compare_logits(source: Source) -> dict[str, float]:
    """Compares float32 logits of two rows: text with two pictures of different sizes, and a shorter one with one.

    Returns `{"tokens", "image_tokens", "max_logit_difference", "max_logit", "same_first_choice"}`. Raises UserError
    without torch or Pillow.
    """
    for module, extra in (("torch", "peers"), ("PIL", "images")):
        if importlib.util.find_spec(module) is None:
            raise UserError(f"check compares with transformers on pictures: {optional_packages.remedy(extra)}")
    lm: VisionLM = source.lm()
    prompts = draw_prompts(lm, read_processor(source.path, lm))
    made = make_batch(lm, prompts)
    params = source.load(nn.unbox(model.abstract_params(lm)))
    actual = np.asarray(jax.jit(lm.apply)({"params": params}, jnp.asarray(made.tokens_BT), made.ctx)[0])
    expected = logits_of(load_reference(source), lm, made, prompts)
    real = np.asarray(made.ctx.mask.segments_BT) > 0
    actual, expected = actual[real], expected[real]
    return {
        "tokens": int(real.sum()),
        "image_tokens": sum(picture.tokens for prompt in prompts for picture in prompt.pictures),
        "max_logit_difference": float(np.abs(expected - actual).max()),
        "max_logit": float(np.abs(expected).max()),
        "same_first_choice": float(np.mean(expected.argmax(-1) == actual.argmax(-1))),
    }


def draw_prompts(lm: VisionLM, processor: Processor, seed: int = 0) -> list[Prompt]:
    """Draws two prompts of random tokens: with two pictures of different sizes, and with one."""
    random, side = np.random.default_rng(seed), max(lm.vision.grid, 4) * lm.vision.patch
    words = [random.integers(0, max(1, lm.image_token // 2), WORDS).tolist() for _ in range(4)]
    sizes = ((side, 2 * side), (2 * side, 2 * side), (side, side))
    first, second, third = (processor.prepare(draw_picture(*size, random)) for size in sizes)
    image = lm.image_token
    return [
        Prompt([*words[0], image, *words[1], image, *words[2]], (first, second), "the first prompt"),
        Prompt([image, *words[3]], (third,), "the second prompt"),
    ]


def draw_picture(height: int, width: int, random: np.random.Generator) -> typing.Any:
    """Draws an RGB picture: a gradient, a rectangle and a little noise."""
    from PIL import Image

    row, column = np.mgrid[:height, :width]
    pixels_hwC = np.stack([255 * row / height, 255 * column / width, 128 + 0 * row], -1)
    top, left = int(random.integers(height // 2)), int(random.integers(width // 2))
    pixels_hwC[top : top + height // 3, left : left + width // 3] = random.integers(0, 256, 3)
    pixels_hwC += random.normal(0, 8, pixels_hwC.shape)
    return Image.fromarray(pixels_hwC.clip(0, 255).astype(np.uint8))


def load_reference(source: Source) -> typing.Any:
    """The model of transformers in float32, for evaluation."""
    import torch
    import transformers

    if source.config["model_type"] == "internvl_chat":
        return check_internvl.build_reference(source)
    with reference_errors.loading(source):
        return transformers.AutoModelForImageTextToText.from_pretrained(
            source.path,
            dtype=torch.float32,
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=False,
        ).eval()


def logits_of(reference: typing.Any, lm: VisionLM, made: PromptBatch, prompts: Sequence[Prompt]) -> np.ndarray:
    """The logits of a model of transformers for a batch, padded at the end, `[B, T, V]`."""
    import torch

    with torch.no_grad():
        return reference(**reference_inputs(lm, made, prompts)).logits.numpy()


def reference_inputs(lm: VisionLM, made: PromptBatch, prompts: Sequence[Prompt]) -> dict[str, typing.Any]:
    """The inputs of a model of transformers for a batch: ids, mask, pixels, and what says which tokens are images."""
    import torch

    segments_BT, slots_BT = made.ctx.mask.segments_BT, made.ctx.images and made.ctx.images.slots_BT
    inputs = {"input_ids": torch.tensor(made.tokens_BT).long(), "attention_mask": torch.tensor(segments_BT).long()}
    if slots_BT is None:
        return inputs
    if lm.axes > 1:
        inputs["mm_token_type_ids"] = torch.tensor((slots_BT >= 0).astype(np.int64))
    pictures = [picture for prompt in prompts for picture in prompt.pictures]
    return inputs | reference_pixels(lm, pictures)


def reference_pixels(lm: VisionLM, pictures: Sequence[PreparedImage]) -> dict[str, typing.Any]:
    """The pixels of pictures as transformers takes them: patches with their grids, or tiles `[N, C, h, w]`."""
    import torch

    if not lm.vision.grid:
        pixels = torch.tensor(np.concatenate([picture.pixels_Pc for picture in pictures]))
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([picture.grid for picture in pictures])}
    tower = lm.vision
    m, p, side = tower.merge, tower.patch, tower.grid * tower.patch
    shape = (-1, tower.grid // m, tower.grid // m, m, m, tower.channels, p, p)
    tiles = np.concatenate([picture.pixels_Pc.reshape(shape) for picture in pictures])
    return {
        "pixel_values": torch.tensor(tiles.transpose(0, 5, 1, 3, 6, 2, 4, 7).reshape(-1, tower.channels, side, side))
    }
