"""Adapters around Linears with biases, those of a diffusers DiT: peft's are read, ours are loaded by peft."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from configs import base
from convert import denoiser_folders as folders
from convert.denoiser_folders import diffusers, torch
from efficientllm import convert, model
from efficientllm.adapters.base import merge
from efficientllm.convert import check_denoiser
from efficientllm.convert import peft as adapter_folder
from efficientllm.embeds.condition import Condition
from efficientllm.registry import build
from efficientllm.train import step
from efficientllm.weights import box_as
from tiers import slow_except

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.xdist_group("diffusers")

MODULES = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
THEIRS = {
    "lora": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=MODULES),
    "rslora": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=MODULES, use_rslora=True),
    "dora": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=MODULES, use_dora=True),
    "pissa": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=MODULES, init_lora_weights="pissa"),
    "loha": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=MODULES),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=5, target_modules=MODULES),
    "lokr of whole blocks": lambda: peft.LoKrConfig(r=8, alpha=5, target_modules=MODULES),
    "glora": lambda: peft.GloraConfig(r=3, target_modules=MODULES),
    "glora of vectors": lambda: peft.GloraConfig(r=3, target_modules=MODULES, config_C="vector", config_D_E="vector"),
    "modulation": lambda: peft.GloraConfig(r=3, target_modules=["norm1.linear", "proj_out_1"]),
}
OURS = (
    "lora(rank=3, alpha=5)",
    "rslora(rank=3, alpha=5)",
    "dora(rank=3, alpha=5)",
    "pissa(rank=3, alpha=5)",
    "loha(rank=3, alpha=5)",
    "lokr(rank=2, alpha=5)",
    "lokr(rank=8, alpha=5)",
    "glora(rank=3)",
    "glora(rank=2, target='/(q|up)/')",
)
JITTER = 0.05


def plain():
    return diffusers.DiTTransformer2DModel.from_pretrained(folders.saved()).eval()


def moved(config):
    """peft around the tiny DiT, every trainable parameter away from its initial value."""
    torch.manual_seed(0)
    tuned = peft.get_peft_model(plain(), config).eval()
    with torch.no_grad():
        for tensor in tuned.parameters():
            if tensor.requires_grad:
                tensor.add_(JITTER * torch.randn(tensor.shape))
    return tuned


def inputs(denoiser):
    draw = np.random.default_rng(0)
    images = draw.normal(size=(2, denoiser.side, denoiser.side, denoiser.channels)).astype(np.float32)
    return images, np.array([37.0, 999.0], np.float32), Condition(np.array([3, denoiser.classes], np.int32))


def predict(denoiser, params):
    return np.asarray(jax.jit(denoiser.apply)({"params": params}, *inputs(denoiser))[0])


def predict_from(folder):
    source = convert.open_source(folder)
    denoiser = source.lm()
    return predict(denoiser, source.load(nn.unbox(model.abstract_params(denoiser))))


def differs(a, b):
    return np.abs(a - b).max() > 1e-2


@pytest.mark.parametrize("kind", slow_except(THEIRS, "lora", "lokr of whole blocks", "glora", "glora of vectors"))
def test_what_peft_writes_is_read_and_merged(kind, tmp_path):
    source = convert.open_source(folders.saved())
    tuned = moved(THEIRS[kind]())
    tuned.save_pretrained(tmp_path / "adapter")
    expected = check_denoiser.predict_with(tuned, *inputs(source.lm()))
    assert differs(expected, check_denoiser.predict_with(plain(), *inputs(source.lm())))
    convert.merge_into(source, tmp_path / "adapter", tmp_path / "merged")
    np.testing.assert_allclose(predict_from(tmp_path / "merged"), expected, atol=1e-5)
    merged = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "merged").eval()
    np.testing.assert_allclose(check_denoiser.predict_with(merged, *inputs(source.lm())), expected, atol=1e-5)


def written(source, spec, folder):
    """Writes an adapter of random factors; returns the model with our parameters."""
    denoiser, method = source.lm(), build("adapter", spec)
    boxed = model.abstract_params(denoiser)
    boxed_params = box_as(boxed, source.load(nn.unbox(boxed)))
    state = nn.unbox(step.create(denoiser, base.get_config().train, method, 0, boxed, boxed_params))
    draw = np.random.default_rng(0)
    learnt = jax.tree.map(lambda leaf: leaf + JITTER * draw.standard_normal(leaf.shape, np.float32), state.params)
    params = step.join(learnt, state.frozen)
    adapter_folder.write(denoiser, spec, params, folder, source)
    return denoiser, params


@pytest.mark.slow
@pytest.mark.parametrize("spec", slow_except(OURS, "dora(rank=3, alpha=5)", "lokr(rank=8, alpha=5)", "glora(rank=3)"))
def test_what_we_write_peft_reads_and_so_do_we(spec, tmp_path):
    source = convert.open_source(folders.saved())
    denoiser, params = written(source, spec, tmp_path / "adapter")
    expected = predict(denoiser, params)
    theirs = peft.PeftModel.from_pretrained(plain(), tmp_path / "adapter").eval()
    np.testing.assert_allclose(check_denoiser.predict_with(theirs, *inputs(denoiser)), expected, atol=1e-5)
    np.testing.assert_allclose(predict_from(tmp_path / "adapter"), expected, atol=1e-5)
    np.testing.assert_allclose(predict(denoiser, merge(params)), expected, atol=1e-5)
    assert differs(expected, predict_from(folders.saved()))
