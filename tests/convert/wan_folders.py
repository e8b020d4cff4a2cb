"""Folders of random video transformers of diffusers, and of its pipeline."""

import functools
import json
import pathlib
import shutil
import tempfile

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "ffn_dim": 40,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


@functools.cache
def reference(**changes):
    """A random model of diffusers whose every parameter is jittered."""
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(**TINY | changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.eval()


@functools.cache
def saved(**changes):
    """The folder that diffusers saves the `reference` to. Tests do not change it."""
    folder = pathlib.Path(tempfile.mkdtemp())
    reference(**changes).save_pretrained(folder)
    return folder


def pipeline(folder, **scheduler):
    """A pipeline's folder with the `reference` as its transformer."""
    shutil.copytree(saved(), folder / "transformer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    fields = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    diffusers.UniPCMultistepScheduler(**fields | scheduler).save_pretrained(folder / "scheduler")
    return folder
