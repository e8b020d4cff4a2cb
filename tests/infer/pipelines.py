"""Whole tiny random pipelines of diffusers, saved as folders: text encoders, transformer, autoencoder, scheduler."""

import functools
import json
import shutil

import runs
from convert.denoiser_folders import diffusers
from convert.encoder_folders import torch
from efficientllm.config.presets import infer_image, infer_video
from efficientllm.infer import setup
from text_states import pipeline_folders
from text_states.pipeline_folders import saved

PROMPTS = ("a red fox, running.", "a bear")
NEGATIVE = "fog"
OTHER = "_class_name = 'WanTransformer3DModel': model_index.json lists 'SD3Transformer2DModel': it is that of another"


def jittered(model, seed):
    """Adds noise to every parameter: those that begin at 0 or 1 would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@functools.cache
def stable_diffusion_3():
    """Pictures of at most 16 x 16 pixels; latents have half the sides."""
    torch.manual_seed(0)
    parts = dict(pipeline_folders.stable_diffusion_3().components)
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4, scaling_factor=0.8,
        shift_factor=0.125, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    parts |= {"vae": jittered(vae, 1), "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)}
    return diffusers.StableDiffusion3Pipeline(**parts)


@functools.cache
def wan():
    """Clips of 2 k + 1 frames; latents have half the sides."""
    torch.manual_seed(0)
    parts = dict(pipeline_folders.wan().components)
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=40, ffn_dim=16,
        num_layers=2, rope_max_seq_len=16,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True], scale_factor_spatial=2,
        scale_factor_temporal=2, latents_mean=[0.1, -0.2, 0.3, 0.5], latents_std=[1.1, 0.7, 2.0, 1.6],
    )  # fmt: skip
    fields = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    parts |= {"transformer": jittered(transformer, 2), "vae": jittered(vae, 1)}
    parts |= {"scheduler": diffusers.UniPCMultistepScheduler(**fields)}
    return diffusers.WanPipeline(**parts)


FOLDERS = {"image": stable_diffusion_3, "video": wan}


def folder(kind):
    """The folder of the pipeline of `image` or `video`. Tests do not change it."""
    return saved(FOLDERS[kind])


def values(kind, **changes):
    """Config values of a short request: two prompts, few steps."""
    of_kind = {
        "image": {"infer.size": (16, 12), "infer.solver": "euler(steps=3, levels='sd3')"},
        "video": {"infer.size": (5, 16, 16), "infer.solver": "unipc(steps=3)"},
    }
    shared = {
        "model.pretrained": str(folder(kind)),
        "text_states": "encoders(length=20)",
        "infer.prompts": PROMPTS,
        "infer.negative_prompt": NEGATIVE,
    }
    return shared | of_kind[kind] | changes


def described(kind, **changes):
    """The Serving of a config in float32."""
    config = {"image": infer_image, "video": infer_video}[kind].get_config("float32")
    config.update_from_flattened_dict(values(kind, **changes))
    return setup.prepare(config)


def arguments(kind, workdir, form="float32", **changes):
    """The command line of a run."""
    flags = [f"--config.{key}={value}" for key, value in values(kind, **changes).items()]
    return [f"--config={runs.ROOT}/configs/infer_{kind}.py:{form}", f"--workdir={workdir}", *flags]


def set_config(part, **values):
    """A change of a copied folder: other values in the config.json of a part."""

    def change(folder):
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def without(part):
    """A change of a copied folder: without a part."""
    return lambda folder: shutil.rmtree(folder / part)


def exchange(part):
    """A change of a copied folder: the part of Wan's pipeline in the place of its own."""

    def change(folder):
        shutil.rmtree(folder / part)
        shutil.copytree(saved(wan) / part, folder / part)

    return change
