"""Adapters of peft around Stable Diffusion 3: both streams, stacks of layers, and shifts after their scales."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest

from configs import base
from convert import sd3_folders as folders
from convert.sd3_folders import diffusers, torch
from efficientllm import convert, model
from efficientllm.convert import check_denoiser
from efficientllm.convert import peft as adapter_folder
from efficientllm.registry import build
from efficientllm.train import step
from efficientllm.weights import box_as

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.xdist_group("diffusers")

STREAMS = ["attn.to_q", "attn.add_k_proj", "attn.to_add_out", "attn2.to_v", "ff.net.0.proj", "ff_context.net.2"]
MODULATIONS = ["norm1.linear", "norm1_context.linear", "norm_out.linear", "context_embedder"]


@pytest.mark.slow
@pytest.mark.parametrize("modules", [STREAMS, MODULATIONS], ids=["streams", "modulations"])
def test_what_peft_writes_is_read_and_merged(modules, tmp_path):
    torch.manual_seed(0)
    plain = diffusers.SD3Transformer2DModel.from_pretrained(folders.saved()).eval()
    tuned = peft.get_peft_model(plain, peft.LoraConfig(r=3, lora_alpha=5, target_modules=modules)).eval()
    with torch.no_grad():
        for tensor in tuned.parameters():
            if tensor.requires_grad:
                tensor.add_(0.05 * torch.randn(tensor.shape))
    tuned.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(folders.saved())}))
    inputs = folders.inputs(folders.reference())
    expected = check_denoiser.predict_with(tuned.base_model.model, *inputs)
    assert np.abs(expected - check_denoiser.predict_with(folders.reference(), *inputs)).max() > 1e-2
    source = convert.open_source(tmp_path)
    denoiser = source.lm()
    params = source.load(nn.unbox(model.abstract_params(denoiser)))
    actual = np.asarray(jax.jit(denoiser.apply)({"params": params}, *inputs)[0])
    np.testing.assert_allclose(actual, expected, atol=2e-5)


@pytest.mark.slow
def test_what_we_write_peft_reads(tmp_path):
    spec = "lora(rank=3, alpha=5, target='/(q|text_o|text_modulation|up)/')"
    source = convert.open_source(folders.saved())
    denoiser, method = source.lm(), build("adapter", spec)
    boxed = model.abstract_params(denoiser)
    params = box_as(boxed, source.load(nn.unbox(boxed)))
    state = nn.unbox(step.create(denoiser, base.get_config().train, method, 0, boxed, params))
    draw = np.random.default_rng(0)
    learnt = jax.tree.map(lambda leaf: leaf + 0.05 * draw.standard_normal(leaf.shape, np.float32), state.params)
    params = step.join(learnt, state.frozen)
    adapter_folder.write(denoiser, spec, params, tmp_path, source)
    inputs = folders.inputs(folders.reference())
    expected = np.asarray(jax.jit(denoiser.apply)({"params": params}, *inputs)[0])
    plain = diffusers.SD3Transformer2DModel.from_pretrained(folders.saved()).eval()
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    np.testing.assert_allclose(check_denoiser.predict_with(theirs.base_model.model, *inputs), expected, atol=2e-5)
    assert np.abs(expected - check_denoiser.predict_with(folders.reference(), *inputs)).max() > 1e-2
