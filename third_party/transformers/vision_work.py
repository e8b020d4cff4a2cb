"""Shared workload of vision-language models: a folder that transformers writes, prompts with a picture, and batches.

Letters: T tokens, P patches of a picture, c features of a patch.
"""

import dataclasses
import json
import pathlib
import typing

import numpy as np

RANK = ALPHA = 16
OPTIMISER = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
# Every linear layer of the language model; the vision tower is frozen.
PEFT_MODULES = r".*language_model.*\.([qkvo]|gate|up|down)_proj"
OUR_TARGET = r"^(?!vision/).*/(mixer|ffn)/"
IGNORED = -100  # the label of what is no target in transformers
PATCH, MERGE = 14, 2
JITTER = 0.02  # of every parameter, so that biases and norms are random too


@dataclasses.dataclass(frozen=True)
class Size:
    """A Qwen2.5-VL: its language model, and `tower_layers` of which every `period`th sees the whole picture."""

    layers: int
    dim: int
    heads: int
    kv_heads: int
    hidden: int
    vocab: int
    tower_layers: int
    period: int
    tower_dim: int
    tower_heads: int
    tower_hidden: int


SIZES = {
    "tiny": Size(2, 64, 4, 2, 96, 200, tower_layers=4, period=2, tower_dim=32, tower_heads=2, tower_hidden=44),
    # The language model has the shape of SmolLM2-135M.
    "smollm2": Size(
        30, 576, 9, 3, 1536, 49152, tower_layers=8, period=4, tower_dim=256, tower_heads=4, tower_hidden=688
    ),
}


class Prompt(typing.NamedTuple):
    """Token ids `[T]` with an image token for each merged patch, and the picture: `[P, c]`, `grid` of patches."""

    ids: np.ndarray
    pixels_Pc: np.ndarray
    grid: tuple[int, int, int]
    is_image: np.ndarray


def write_folder(name, folder, seed=0):
    """Writes a model of random weights with transformers -> the number of its parameters."""
    import torch
    import transformers

    size = SIZES[name]
    torch.manual_seed(seed)
    model = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(**_config(size)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(JITTER * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model.num_parameters()


def _config(size):
    quarter = size.dim // size.heads // 8  # half of a head's features are angles: a quarter of them of time
    text = {
        "vocab_size": size.vocab,
        "hidden_size": size.dim,
        "intermediate_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "max_position_embeddings": 8192,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [quarter, (3 * quarter) // 2, 3 * quarter - (3 * quarter) // 2],
        },
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    vision = {
        "depth": size.tower_layers,
        "hidden_size": size.tower_dim,
        "intermediate_size": size.tower_hidden,
        "num_heads": size.tower_heads,
        "out_hidden_size": size.dim,
        "fullatt_block_indexes": [*range(size.period - 1, size.tower_layers, size.period)],
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
    }
    marks = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: size.vocab - 1 - place for place, name in enumerate(marks)}
    return ids | {"text_config": text, "vision_config": vision, "tie_word_embeddings": True}


def read_config(folder):
    """The model's config.json."""
    return json.loads((pathlib.Path(folder) / "config.json").read_text())


def prompt(folder, pixels, text, number):
    """A prompt of one picture of `pixels` squared amid `text` random tokens; another for each `number`."""
    config, random = read_config(folder), np.random.default_rng(number)
    side = pixels // PATCH
    channels_and_frames = 3 * 2
    pixels_Pc = random.standard_normal((side * side, channels_and_frames * PATCH**2), np.float32)
    ids = random.integers(0, config["text_config"]["vocab_size"] - 4, text)
    marks = [config[f"vision_{place}_token_id"] for place in ("start", "end")]
    image = [config["image_token_id"]] * (side // MERGE) ** 2
    half = text // 2
    ids = np.concatenate([ids[: half - 1], marks[:1], image, marks[1:], ids[half + 1 :]])
    return Prompt(ids, pixels_Pc, (1, side, side), ids == config["image_token_id"])


def batch(folder, pixels, length, rows, step):
    """The prompts of a training batch, of `length` tokens each."""
    text = length - (pixels // PATCH // MERGE) ** 2
    return [prompt(folder, pixels, text, 10_000 + step * rows + row) for row in range(rows)]


def labels(prompts):
    """What each token predicts, `[rows, T]`: the next one; IGNORED for images and after the last."""
    next_ids = np.stack([np.append(prompt.ids[1:], IGNORED) for prompt in prompts])
    is_image = np.stack([np.append(prompt.is_image[1:], True) for prompt in prompts])
    return np.where(is_image, IGNORED, next_ids)
