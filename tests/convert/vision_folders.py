"""Folders of random vision-language models of transformers, with every parameter jittered."""

import functools
import pathlib
import tempfile

import numpy as np
import pytest

from efficientllm.convert.check_vision import reference_pixels
from efficientllm.vision.tower_rows import PreparedImage

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

IMAGE, VOCAB = 190, 200
_TEXT = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
_TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-6}
_TEXT |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_QWEN = {"image_token_id": IMAGE, "video_token_id": 191, "vision_start_token_id": 192, "vision_end_token_id": 193}
_QWEN |= {"text_config": _TEXT | {"rope_parameters": _MROPE}}
_WINDOWS = {"depth": 4, "hidden_size": 32, "intermediate_size": 44, "num_heads": 2, "out_hidden_size": 64}
_WINDOWS |= {"window_size": 112, "fullatt_block_indexes": [1, 3], "tokens_per_second": 2}
_CLIP = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
_CLIP |= {"num_attention_heads": 2, "image_size": 56, "patch_size": 14}
_INTERN = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_INTERN |= {"image_size": [56, 56], "patch_size": [14, 14]}
_RMS = {"use_qk_norm": True, "norm_type": "rms_norm"}
_LLAMA, _QWEN2 = ({"model_type": name} for name in ("llama", "qwen2"))
_UNTIED = {"tie_word_embeddings": False}
# name: class without its ending, values of its configuration
MODELS = {
    "qwen2.5": ("Qwen2_5_VL", _QWEN | {"vision_config": _WINDOWS}),
    "qwen2.5-tied": (
        "Qwen2_5_VL",
        _QWEN
        | {"tie_word_embeddings": True}
        | {"vision_config": _WINDOWS | {"intermediate_size": 40, "window_size": 56, "fullatt_block_indexes": [2]}},
    ),
    "qwen2": (
        "Qwen2VL",
        _QWEN | {"vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2}},
    ),
    "llava": ("Llava", {"vision_config": _CLIP, "text_config": _TEXT | _LLAMA, "image_token_index": IMAGE}),
    "llava-plain": (
        "Llava",
        {"vision_config": _CLIP | {"layer_norm_eps": 1e-3, "hidden_act": "gelu"}, "text_config": _TEXT | _LLAMA}
        | {"image_token_index": IMAGE, "vision_feature_layer": -1, "multimodal_projector_bias": False},
    ),
    "internvl": (
        "InternVL",
        {"vision_config": _INTERN | _RMS, "text_config": _TEXT | _QWEN2, "image_token_id": IMAGE} | _UNTIED,
    ),
    "internvl-plain": (
        "InternVL",
        {"vision_config": _INTERN | {"attention_bias": True, "use_mean_pooling": False}, "image_token_id": IMAGE}
        | {"text_config": _TEXT | _QWEN2, "tie_word_embeddings": True},
    ),
}
# Frames, rows and columns of patches: edge windows both ways, whole windows, two frames.
GRIDS = [(1, 10, 14), (1, 8, 16), (2, 6, 4)]


def build(name, seed=0, jitter=0.1, **changes):
    """A random model of transformers; norms, biases, tables and gates too are random."""
    kind, values = MODELS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**values | changes)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(jitter * torch.randn(parameter.shape))
    return model.eval()


@functools.cache
def reference(name):
    """The model of `saved`."""
    return build(name)


@functools.cache
def saved(name):
    """The folder that transformers saves the `reference` to. Tests do not change it."""
    folder = pathlib.Path(tempfile.mkdtemp())
    reference(name).save_pretrained(folder)
    return folder


def pictures(name, grids=GRIDS, seed=0):
    """Random pictures of grids; of towers with one size, as many tiles as the grid has frames."""
    random = np.random.default_rng(seed)
    if not name.startswith("qwen"):
        return [_tiles(name, grid[0], random) for grid in grids]
    return [
        PreparedImage(random.normal(size=(np.prod(grid), 1176)).astype(np.float32), grid, int(np.prod(grid)) // 4)
        for grid in grids
    ]


def _tiles(name, count, random):
    """Tiles of 4 x 4 patches, in groups of 2 x 2 where the tower merges."""
    merge = 2 if name.startswith("intern") else 1
    grid = (count, 4, 4)
    pixels = random.normal(size=(16 * count, 588)).astype(np.float32)
    return PreparedImage(pixels, grid, 16 * count // merge**2)


def features(name, lm, images):
    """The features of all pictures by transformers, one after another."""
    with torch.no_grad():
        found = reference(name).model.get_image_features(**reference_pixels(lm, images)).pooler_output
    found = torch.cat(list(found)) if isinstance(found, list | tuple) else found
    return found.reshape(-1, found.shape[-1]).numpy()


def opened(file):
    """An image file in RGB."""
    from PIL import Image

    return Image.open(file).convert("RGB")
