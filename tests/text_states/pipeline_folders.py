"""Folders of tiny random pipelines of diffusers: text encoders, tokenizers, and what a transformer reads."""

import functools
import pathlib
import shutil
import tempfile

from convert import encoder_folders
from convert.denoiser_folders import diffusers
from convert.encoder_folders import transformers

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!"
CLIP_VOCAB = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "fo", "fox</w>", "<|startoftext|>", "<|endoftext|>"]
T5_VOCAB = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁a", -2.5), ("fox", -2.5)]
T5_VOCAB += [(letter, -3.0) for letter in LETTERS]
_CLIP = {"vocab_size": len(CLIP_VOCAB), "max_position_embeddings": 77, "num_hidden_layers": 2, "eos_token_id": 2}
_T5 = {"vocab_size": len(T5_VOCAB), "num_layers": 2, "d_model": 40}
_VAE, _SCHEDULER = None, diffusers.FlowMatchEulerDiscreteScheduler


def clip_tokenizer(**changes):
    ids = {token: id for id, token in enumerate(CLIP_VOCAB)}
    merges = [("f", "o"), ("fo", "x</w>")]
    return transformers.CLIPTokenizer(vocab=ids, merges=merges, model_max_length=77, **changes)


def t5_tokenizer():
    return transformers.T5TokenizerFast(vocab=T5_VOCAB, extra_ids=0, model_max_length=512)


def clip(name, seed, width):
    values = {"hidden_size": width, "projection_dim": width, "num_attention_heads": 2}
    return encoder_folders.build(name, seed, 0.05, **_CLIP | values)


@functools.cache
def stable_diffusion_3(with_t5=True):
    """The pipeline; states of CLIP-L have 12 numbers, of bigG 16, and of T5 40."""
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=40, pooled_projection_dim=28,
        pos_embed_max_size=4,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=_SCHEDULER(),
        vae=_VAE,
        text_encoder=clip("clip-quick", 0, 12),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip("clip-erf", 1, 16),
        tokenizer_2=clip_tokenizer(pad_token="!"),
        text_encoder_3=encoder_folders.build("t5", 2, 0.05, **_T5) if with_t5 else None,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
    )


@functools.cache
def wan():
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=40, ffn_dim=16,
        num_layers=1, rope_max_seq_len=16,
    )  # fmt: skip
    encoder = encoder_folders.build("umt5", 3, 0.05, **_T5)
    return diffusers.WanPipeline(t5_tokenizer(), encoder, _VAE, _SCHEDULER(), transformer)


@functools.cache
def saved(make, *arguments):
    """The folder that diffusers saves a pipeline to. Tests do not change it."""
    folder = pathlib.Path(tempfile.mkdtemp())
    make(*arguments).save_pretrained(folder)
    return folder


def copied(folder, new):
    return pathlib.Path(shutil.copytree(folder, new))
