"""Writes a tiny Stable Diffusion 3 and a tiny Wan of random weights, as pipelines of diffusers, without diffusers.

  python experiments/generators/pipelines.py --out=runs/generators

Their parts are those of the published pipelines: text encoders and tokenizers, the transformer, the autoencoder, the
scheduler's settings. Nothing is zero at first, as it is in new transformers: every method would start where its
gradients vanish.
"""

import argparse
import json
import pathlib
import string
import tempfile

import flax.linen as nn
import flax.traverse_util
import numpy as np

from efficientllm import convert, model
from efficientllm.autoencoders import kl, kl_folder, wan, wan_folder
from efficientllm.errors import UserError, exit_with

LETTERS = string.ascii_letters + string.digits
CLIP_VOCAB = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
T5_VOCAB = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
TEXT = 64  # width of the states of a token
LATENTS = 16  # channels
SD3 = {
    "_class_name": "SD3Transformer2DModel", "sample_size": 16, "patch_size": 2, "in_channels": LATENTS,
    "out_channels": LATENTS, "attention_head_dim": 32, "joint_attention_dim": TEXT, "pooled_projection_dim": 56,
    "pos_embed_max_size": 24, "qk_norm": "rms_norm",
}  # fmt: skip
WAN = {
    "_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2], "in_channels": LATENTS, "out_channels": LATENTS,
    "attention_head_dim": 32, "text_dim": TEXT, "freq_dim": 256, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "rope_max_seq_len": 64,
}  # fmt: skip
KL = {
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2, "block_out_channels": [8, 16], "layers_per_block": 1,
    "latent_channels": LATENTS, "norm_num_groups": 4, "scaling_factor": 1.0, "shift_factor": 0.0,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
WAN_VAE = {
    "_class_name": "AutoencoderKLWan", "base_dim": 4, "z_dim": LATENTS, "dim_mult": [1, 2, 2], "num_res_blocks": 1,
    "temperal_downsample": [False, True], "scale_factor_spatial": 4, "scale_factor_temporal": 2,
    "latents_mean": [0.0] * LATENTS, "latents_std": [1.0] * LATENTS,
}  # fmt: skip


def clip(width, act):
    """The config.json of an encoder of CLIP's kind."""
    return {
        "model_type": "clip_text_model", "architectures": ["CLIPTextModelWithProjection"], "hidden_act": act,
        "vocab_size": len(CLIP_VOCAB), "hidden_size": width, "projection_dim": width,
        "intermediate_size": 4 * width, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 77, "eos_token_id": 2,
    }  # fmt: skip


def t5(kind, architecture):
    """The config.json of an encoder of T5's kind."""
    return {
        "model_type": kind, "architectures": [architecture], "vocab_size": len(T5_VOCAB), "d_model": TEXT,
        "d_kv": 16, "d_ff": 2 * TEXT, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    }  # fmt: skip


PIPELINES = {
    "sd3": {
        "transformer": SD3,
        "vae": KL,
        "text_encoder": clip(24, "quick_gelu"),
        "text_encoder_2": clip(32, "gelu"),
        "text_encoder_3": t5("t5", "T5EncoderModel"),
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    },
    "wan": {
        "transformer": WAN,
        "vae": WAN_VAE,
        "text_encoder": t5("umt5", "UMT5EncoderModel"),
        "scheduler": {
            "_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True,
            "flow_shift": 3.0,
        },
    },
}  # fmt: skip
CLASSES = {"sd3": "StableDiffusion3Pipeline", "wan": "WanPipeline"}
TOKENIZERS = {"sd3": {"tokenizer": "clip", "tokenizer_2": "clip", "tokenizer_3": "t5"}, "wan": {"tokenizer": "t5"}}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/generators", help="the folder of both, default: %(default)s")
    parser.add_argument("--heads", type=int, default=4, help="of transformers, 32 of its width each")
    parser.add_argument("--layers", type=int, default=4, help="of transformers; Wan takes an even number")
    options = parser.parse_args(argv)
    for name in PIPELINES:
        write(name, pathlib.Path(options.out) / name, options.heads, options.layers)


def write(name, folder, heads=4, layers=4):
    """Writes the pipeline `name` to a new folder, with a transformer of that many heads and layers."""
    if folder.exists():
        raise UserError(f"--out: {folder} is there already; name another folder, or take it as it is")
    listed = {"_class_name": CLASSES[name]}
    for seed, (part, config) in enumerate(PIPELINES[name].items()):
        kind = config["_class_name"] if "_class_name" in config else config["architectures"][0]
        listed[part] = ["diffusers" if "_class_name" in config else "transformers", kind]
        _write_part(folder / part, _sized(config, heads, layers) if part == "transformer" else config, seed)
    for part, kind in TOKENIZERS[name].items():
        listed[part] = ["transformers", type(tokenizer(kind)).__name__]
        tokenizer(kind).save_pretrained(folder / part)
    (folder / "model_index.json").write_text(json.dumps(listed, indent=1) + "\n")
    print(folder)


def _sized(config, heads, layers):
    width = 32 * heads
    widths = {"caption_projection_dim": width} if config is SD3 else {"ffn_dim": 4 * width}
    return config | {"num_attention_heads": heads, "num_layers": layers} | widths


def tokenizer(kind):
    """A tokenizer of letters and digits, of CLIP's kind or of T5's."""
    import transformers

    if kind == "t5":
        return transformers.T5TokenizerFast(vocab=T5_VOCAB, extra_ids=0, model_max_length=512)
    ids = {token: id for id, token in enumerate(CLIP_VOCAB)}
    return transformers.CLIPTokenizer(vocab=ids, merges=[], model_max_length=77)


def _write_part(folder, config, seed):
    if folder.name == "scheduler":
        _write_json(folder / "scheduler_config.json", config)
    elif folder.name == "vae":
        _write_autoencoder(folder, config, seed)
    else:
        _write_model(folder, config, seed)


def _write_model(folder, config, seed):
    with tempfile.TemporaryDirectory() as described:
        _write_json(pathlib.Path(described) / "config.json", config)
        source = convert.open_source(described, weights=False)
        lm, draw = source.lm(), np.random.default_rng(seed)
        flat = flax.traverse_util.flatten_dict(nn.unbox(model.abstract_params(lm)), sep="/")
        drawn = {path: _draw(draw, path, leaf.shape) for path, leaf in flat.items()}
        convert.export(lm, flax.traverse_util.unflatten_dict(drawn, sep="/"), folder, like=source)


def _write_autoencoder(folder, config, seed):
    from safetensors.numpy import save_file

    _write_json(folder / "config.json", config)
    draw, leaves = np.random.default_rng(seed), _leaves(config)
    tensors = {leaf.template: _draw(draw, path, leaf.disk_shape, leaf.disk_shape[1:]) for path, leaf in leaves.items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def _leaves(config):
    """The parameters of an autoencoder by path, with the names and shapes of their tensors."""
    if config is KL:
        return kl_folder.leaves_of(kl.abstract_params(kl_folder.describe_config(config, "KL", "float32").shape))
    shape = wan_folder.describe_config(config, "WAN_VAE", "float32").shape
    return wan_folder.leaves_of(wan.abstract_params(shape), shape.layers)


def _draw(draw, path, shape, inputs=None):
    """Random float32 of a scale that keeps activations near 1. `inputs` are the sizes that a kernel sums over."""
    noise, name = draw.standard_normal(shape, np.float32), path.rpartition("/")[2]
    if name == "scale":
        return 1 + 0.1 * noise
    if name == "bias":
        return 0.02 * noise
    if inputs is None:
        inputs = shape[-2:-1] if name == "kernel" else shape[-1:]
    return noise * np.float32(np.prod(inputs) ** -0.5)


def _write_json(file, values):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    exit_with(main)
