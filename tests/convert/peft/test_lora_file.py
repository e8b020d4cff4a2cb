"""LoRA in the file format of diffusers: written, loaded by its own loaders, and read back."""

import json

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from convert import denoiser_folders as folders
from convert.denoiser_folders import diffusers, torch
from convert.peft.test_denoiser_adapters import MODULES, inputs, peft, predict, predict_from, written
from efficientllm import convert
from efficientllm.convert import check_denoiser
from efficientllm.convert.__main__ import main
from efficientllm.convert.peft import lora_file
from efficientllm.errors import UserError
from infer import pipelines
from tiers import slow_except

pytestmark = pytest.mark.xdist_group("diffusers")


class LoadableDiT(diffusers.DiTTransformer2DModel, diffusers.loaders.PeftAdapterMixin):
    """A DiT with the loader that diffusers gives its larger transformers."""


class Pipeline(diffusers.loaders.SD3LoraLoaderMixin):
    """What the loader of Stable Diffusion 3's pipeline reads of a pipeline."""

    text_encoder = text_encoder_2 = hf_device_map = None
    components = {}

    def __init__(self):
        self.transformer = LoadableDiT.from_pretrained(folders.saved()).eval()


@pytest.mark.parametrize(
    "spec",
    slow_except(
        ["lora(rank=3, alpha=5)", "rslora(rank=3, alpha=5)", "dora(rank=3, alpha=5)", "pissa(rank=3, alpha=5)"],
        "lora(rank=3, alpha=5)",
    ),
)
def test_a_pipeline_loads_what_we_write_and_so_do_we(spec, tmp_path):
    source = convert.open_source(folders.saved())
    denoiser, params = written(source, spec, tmp_path / "adapter")
    expected = predict(denoiser, params)
    pipeline = Pipeline()
    pipeline.load_lora_weights(tmp_path / "adapter")
    loaded = check_denoiser.predict_with(pipeline.transformer, *inputs(denoiser))
    np.testing.assert_allclose(loaded, expected, atol=1e-5)
    file = tmp_path / "adapter" / lora_file.NAME
    convert.merge_into(source, file, tmp_path / "merged")
    np.testing.assert_allclose(predict_from(tmp_path / "merged"), expected, atol=1e-5)
    with safe_open(file, "np") as opened:
        metadata = json.loads(opened.metadata()["lora_adapter_metadata"])
        names = set(opened.keys())
    assert all(key.startswith("transformer.") for key in metadata)
    assert metadata["transformer.r"] == (6 if spec.startswith("pissa") else 3)
    assert {"transformer.transformer_blocks.1.attn1.to_out.0.lora_A.weight"} < names


@pytest.mark.parametrize("kind", slow_except(["image", "video"], "image"))
def test_whole_pipelines_load_what_we_write(kind, tmp_path):
    """Stable Diffusion 3 and Wan, by `load_lora_weights` of their own pipelines."""
    source = convert.open_source(pipelines.folder(kind))
    denoiser, params = written(source, "lora(rank=3, alpha=5)", tmp_path / "adapter")
    images, *others = check_denoiser.random_inputs(denoiser)
    inputs = images[..., :8, :8, :], *others  # no larger than the table of positions
    expected = np.asarray(jax.jit(denoiser.apply)({"params": params}, *inputs)[0])
    pipeline = diffusers.DiffusionPipeline.from_pretrained(pipelines.folder(kind))
    before = check_denoiser.predict_with(pipeline.transformer, *inputs)
    pipeline.load_lora_weights(tmp_path / "adapter")
    loaded = check_denoiser.predict_with(pipeline.transformer, *inputs)
    np.testing.assert_allclose(loaded, expected, atol=2e-5)
    assert np.abs(loaded - before).max() > 1e-2


def saved_by_diffusers(folder, alpha=5, **changes):
    """A file of a pipeline's `save_lora_weights` -> the predictions of its model."""
    pipeline, model = Pipeline(), None
    torch.manual_seed(0)
    model = pipeline.transformer
    model.add_adapter(peft.LoraConfig(r=3, lora_alpha=alpha, target_modules=MODULES, **changes))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.add_(0.05 * torch.randn(tensor.shape))
    layers = peft.get_peft_model_state_dict(model)
    metadata = diffusers.training_utils._collate_lora_metadata({"transformer": model})
    diffusers.StableDiffusion3Pipeline.save_lora_weights(folder, transformer_lora_layers=layers, **metadata)
    return model


def test_what_a_pipeline_saves_is_merged_by_the_command(tmp_path, capsys):
    source = convert.open_source(folders.saved())
    model = saved_by_diffusers(tmp_path / "lora", rank_pattern={"to_q": 2})
    expected = check_denoiser.predict_with(model, *inputs(source.lm()))
    argv = [str(folders.saved()), f"--merge={tmp_path / 'lora'}", f"--out={tmp_path / 'merged'}"]
    assert main(argv) == 0, capsys.readouterr().err
    np.testing.assert_allclose(predict_from(tmp_path / "merged"), expected, atol=1e-5)


def test_without_metadata_the_scale_is_one(tmp_path):
    """Each module of a rank of its own, as diffusers takes it."""
    source = convert.open_source(folders.saved())
    model = saved_by_diffusers(tmp_path / "lora", alpha=3, rank_pattern={"to_q": 2}, alpha_pattern={"to_q": 2})
    expected = check_denoiser.predict_with(model, *inputs(source.lm()))
    file = tmp_path / "lora" / lora_file.NAME
    save_file(load_file(file), file, metadata={"format": "pt"})
    convert.merge_into(source, tmp_path / "lora", tmp_path / "merged")
    np.testing.assert_allclose(predict_from(tmp_path / "merged"), expected, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: {}, "no tensor in it is named MODULE.lora_A.weight"),
        (lambda tensors: {f"text_encoder.{name}": array for name, array in tensors.items()}, "belongs to nothing"),
        (
            lambda tensors: {name: array for name, array in tensors.items() if "lora_A" in name},
            "lora_B.weight' is missing",
        ),
    ],
    ids=["empty", "text encoder", "half"],
)
def test_what_is_no_lora_of_the_model_is_one_line(change, message, tmp_path):
    source = convert.open_source(folders.saved())
    name = "transformer.transformer_blocks.0.attn1.to_q"
    tensors = {
        f"{name}.lora_A.weight": np.ones((2, 24), np.float32),
        f"{name}.lora_B.weight": np.ones((24, 2), np.float32),
    }
    save_file(change(tensors), tmp_path / lora_file.NAME)
    with pytest.raises(UserError, match=message) as error:
        convert.merge_into(source, tmp_path, tmp_path / "merged")
    assert "\n" not in str(error.value) and not (tmp_path / "merged").exists()
