"""Comparison of a diffusion transformer's predictions here and in diffusers."""

import importlib.util
import typing

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np

from efficientllm import model
from efficientllm.convert import write
from efficientllm.convert.hf_config import families, sd3, wan
from efficientllm.convert.source import Source
from efficientllm.convert.tensors import parameter_map
from efficientllm.embeds.condition import Condition
from efficientllm.embeds.patches import Denoiser
from efficientllm.errors import UserError
from efficientllm.runtime import optional_packages
from efficientllm.typing import Params

DIT = "DiTTransformer2DModel"
LEVELS = (0.0, 1.0, 321.0, 999.0)
# What diffusers calls the leaves of a condition.
_ARGUMENTS = {"labels_B": "class_labels", "text_BSE": "encoder_hidden_states", "pooled_BE": "pooled_projections"}


def compare_predictions(source: Source) -> dict[str, float]:
    """Compares float32 predictions of noise at four levels, of a model of classes one of them without a label.

    Returns `{"images", "max_difference", "max_prediction"}`. A published DiT is compared with diffusers' class at the
    published frequencies. Raises UserError without torch or diffusers, and for a model that is none of `REFERENCES`.
    """
    if None in map(importlib.util.find_spec, ("torch", "diffusers")):
        raise UserError(f"check compares with diffusers on torch: {optional_packages.remedy('peers')}")
    denoiser: typing.Any = source.lm()
    params = source.load(nn.unbox(model.abstract_params(denoiser)))
    inputs = random_inputs(denoiser)
    actual = np.asarray(jax.jit(denoiser.apply)({"params": params}, *inputs)[0])
    expected = predict_with(reference_model(denoiser, params), *inputs)
    return {
        "images": len(LEVELS),
        "max_difference": float(np.abs(actual - expected).max()),
        "max_prediction": float(np.abs(expected).max()),
    }


def random_inputs(denoiser: Denoiser) -> tuple[np.ndarray, np.ndarray, Condition]:
    """Draws an image for each of `LEVELS`, and what the model reads of it: labels, the last of them none, or texts.

    Of a model that takes every size they are small, and clips have two frames.
    """
    draw, rows, size = np.random.default_rng(0), len(LEVELS), denoiser.size
    if denoiser.any_size:
        size = (*(2,) * (len(size) - 2), 4 * denoiser.patch, 6 * denoiser.patch)
    images_BhwC = draw.normal(size=(rows, *size, denoiser.channels)).astype(np.float32)
    labels_B: np.ndarray = np.array([*draw.integers(0, max(1, denoiser.classes), rows - 1), denoiser.classes], np.int32)
    shapes = {name: (rows, *leaf.shape) for name, leaf in denoiser.condition_shapes().items()}
    texts = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items() if name != "labels"}
    labels = {"labels": labels_B} if "labels" in shapes else {}
    return images_BhwC, np.asarray(LEVELS, np.float32), Condition.of(texts | labels)


def predict_with(
    reference: typing.Any, images_BhwC: np.ndarray, levels_B: np.ndarray, condition: Condition
) -> np.ndarray:
    """Predictions `[B, h, w, C]` of a diffusers model, or of peft's around one; of clips `[B, F, h, w, C]`."""
    import torch

    images = torch.tensor(np.moveaxis(images_BhwC, -1, 1).copy())
    leaves = {name: getattr(condition, field) for field, name in _ARGUMENTS.items()}
    tensors = {name: torch.tensor(np.array(leaf)) for name, leaf in leaves.items() if leaf is not None}
    with torch.no_grad():
        outputs = reference(images, timestep=torch.tensor(levels_B), **tensors).sample
    return np.moveaxis(outputs.numpy(), 1, -1)


def reference_model(denoiser: Denoiser, params: Params) -> typing.Any:
    """Diffusers' model with these parameters, for evaluation; a DiT at the frequencies of `denoiser`.

    Raises UserError for a denoiser that is none of diffusers' DiT, Stable Diffusion 3 and Wan.
    """
    name = DIT
    if denoiser.text_length:
        name = sd3.NAME if denoiser.pooled_dim else wan.NAME
    config = write.config_of_family(denoiser.clone(time_denominator=127) if name == DIT else denoiser, name)
    import diffusers
    import torch

    flat = flax.traverse_util.flatten_dict(params, sep="/")
    leaves = parameter_map.bind_parameters(denoiser, families.DENOISERS[name].table)
    state = {
        name: torch.tensor(np.array(tensor.join([np.asarray(flat[path][where]) for path, _, where in tensor.parts])))
        for name, tensor in parameter_map.disk_tensors(leaves).items()
    }
    arguments = {key: value for key, value in config.items() if key != "_class_name"}
    reference = getattr(diffusers, name)(**arguments)
    missing, unexpected = reference.load_state_dict(state, strict=False)
    if unexpected or set(missing) - families.DENOISERS[name].constants.keys():
        raise UserError(f"diffusers' {name} has other tensors: {[*missing, *unexpected]}")
    if name == DIT:
        for block in reference.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 128 - denoiser.time_denominator
    return reference.eval()
