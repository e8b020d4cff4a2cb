"""Folders of diffusion transformers: what is refused, what the command says, and runs that start from one."""

import inspect
import json

import flax.linen as nn
import numpy as np
import pytest

import runs
from autoencoders import folders as autoencoders
from convert import denoiser_folders as folders
from convert.denoiser_folders import diffusers
from efficientllm import convert, main, model
from efficientllm.convert import __main__ as command
from efficientllm.convert import check_denoiser
from efficientllm.convert.hf_config.class_defaults import DIFFUSERS
from efficientllm.errors import UserError
from efficientllm.record.row import read_record
from efficientllm.registry import build

pytestmark = pytest.mark.xdist_group("diffusers")

EMBEDDING = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"


def read(folder):
    source = convert.open_source(folder)
    return source.bind(source.lm())


@pytest.mark.parametrize(
    "config, tensors, message",
    [
        ({"_class_name": "PixArtTransformer2DModel"}, {}, "_class_name = 'PixArtTransformer2DModel' is none of DiT"),
        ({"norm_type": "ada_norm_single"}, {}, 'norm_type = "ada_norm_single" is not supported'),
        ({"activation_fn": "geglu"}, {}, 'activation_fn = "geglu" is not supported'),
        ({"norm_elementwise_affine": True}, {}, "norm_elementwise_affine = true is not supported"),
        ({"out_channels": 7}, {}, "out_channels = 7 is not supported: in_channels = 4, or twice as many"),
        ({"num_layers": -1}, {}, "num_layers = -1: must be a whole number"),
        ({"num_layers": 3}, {}, "tensor 'transformer_blocks.2.* is missing"),
        ({"patch_size": 4}, {}, r"'proj_out_2.bias' has shape \[32\], the config asks for \[128\]"),
        ({"sample_size": 9}, {}, "patch = 2, tile = 1: pictures of side 9"),
        ({"qk_norm": "rms"}, {}, 'qk_norm = "rms" is not supported'),
        ({}, {EMBEDDING: np.zeros((11, 24), np.float32)}, f"'{EMBEDDING}' is not 'transformer_blocks.0"),
        ({}, {EMBEDDING: None}, f"tensor '{EMBEDDING}' of shape .* is missing"),
        ({}, {"pos_embed.pos_embed": np.ones((1, 16, 24), np.float32)}, "'pos_embed.pos_embed' is not the fixed table"),
        ({}, {"extra": np.ones(3, np.float32)}, "tensor 'extra' belongs to nothing"),
    ],
)
def test_what_is_refused(config, tensors, message, tmp_path):
    folder = folders.edit(folders.saved(), tmp_path / "edited", config, **tensors)
    with pytest.raises(UserError, match=message) as refused:
        read(folder)
    assert "\n" not in str(refused.value)


def test_the_older_class_name_and_a_stored_table_of_positions(tmp_path):
    table = folders.reference().pos_embed.pos_embed.numpy()
    config = {"_class_name": "Transformer2DModel", "attention_type": "default", "cross_attention_dim": None}
    folder = folders.edit(folders.saved(), tmp_path / "old", config, **{"pos_embed.pos_embed": table})
    assert convert.open_source(folder).model == convert.open_source(folders.saved()).model
    assert read(folder)


def test_a_published_model_without_config_json(tmp_path):
    """Its shapes say all but the number of heads, which is that of a published width."""
    wide = {"num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 1}
    folder = folders.save_published(tmp_path / "wide", config=False, **wide)
    denoiser = convert.open_source(folder).lm()
    assert (denoiser.dim, denoiser.num_layers, denoiser.side, denoiser.classes) == (384, 1, 8, 10)
    assert "num_heads=6" in denoiser.blocks[0][0] and denoiser.learned_sigma and denoiser.time_denominator == 128
    assert read(folder)
    narrow = folders.save_published(tmp_path / "narrow", config=False)
    with pytest.raises(UserError, match="config.json is missing, and a width of 24 was not published: write one"):
        convert.open_source(narrow)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"class_dropout_prob": 0}, "class_dropout_prob = 0 is not supported: without dropout"),
        ({"num_heads": 7}, "num_heads = 7 does not divide hidden_size = 24"),
        ({"learn_sigma": False}, r"'final_layer.linear.bias' has shape \[32\], the config asks for \[16\]|final_layer"),
    ],
)
def test_published_models_that_are_refused(config, message, tmp_path):
    folder = folders.edit(folders.save_published(tmp_path / "a"), tmp_path / "b", config)
    with pytest.raises(UserError, match=message):
        read(folder)


def test_a_family_that_cannot_hold_a_model(tmp_path):
    """Neither form of DiT is the other's."""
    source = convert.open_source(folders.save_published(tmp_path / "published"))
    with pytest.raises(UserError, match="DiTTransformer2DModel checkpoints cannot hold .*: time_denominator is 128"):
        convert.export(source.lm(), {}, tmp_path / "out", "DiTTransformer2DModel")
    with pytest.raises(UserError, match="no family 'llama' of checkpoints; known: DiTTransformer2DModel"):
        convert.export(source.lm(), {}, tmp_path / "out", "llama")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["diffusers", "published"])
def test_the_command_checks_and_converts(kind, tmp_path, capsys, monkeypatch):
    folder = folders.saved() if kind == "diffusers" else folders.save_published(tmp_path / "in")
    assert command.main(["check", str(folder)]) == 0
    printed = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert float(printed["max difference"]) < 1e-5 * float(printed["max prediction"]) and printed["images"] == "4"
    assert command.main([str(folder), f"--out={tmp_path / 'out'}", "--dtype=bfloat16"]) == 0
    assert ("DiTTransformer2DModel" if kind == "diffusers" else "DiT") + ", bfloat16" in capsys.readouterr().out
    assert convert.open_source(tmp_path / "out").stored_dtype == "bfloat16"
    predict = check_denoiser.predict_with
    monkeypatch.setattr(check_denoiser, "predict_with", lambda *arguments: 1.01 * predict(*arguments))
    assert command.main(["check", str(folder)]) == 1


def test_check_without_diffusers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert command.main(["check", str(folders.saved())]) == 2
    assert "check compares with diffusers on torch: pip install" in capsys.readouterr().err


def test_a_model_of_pictures_has_no_tokenizer():
    with pytest.raises(UserError, match="a model of pictures has no tokenizer; set config.objective"):
        convert.open_source(folders.saved()).tokenizer()


def test_the_objective_is_that_of_the_pipelines_schedule(tmp_path):
    folder = folders.pipeline(tmp_path / "in")
    assert convert.open_source(folder / "transformer").objective() == "ddpm(vlb=True)"
    build("objective", convert.open_source(folder).objective()).check(convert.open_source(folder).lm())
    diffusers.DDIMScheduler(500, 0.001, 0.01).save_pretrained(folder / "scheduler")
    objective = build("objective", convert.open_source(folder).objective())
    assert (objective.steps, objective.beta, objective.vlb) == (500, (0.001, 0.01), True)
    diffusers.DDIMScheduler(beta_schedule="scaled_linear").save_pretrained(folder / "scheduler")
    with pytest.raises(UserError, match='scheduler_config.json: beta_schedule = "scaled_linear" is not supported'):
        convert.open_source(folder).objective()


def test_quantized_folders_are_read_again(tmp_path, capsys):
    assert command.main([str(folders.saved()), "--quant=int8()", f"--out={tmp_path / 'out'}"]) == 0
    source = convert.open_source(tmp_path / "out")
    denoiser = source.lm(scan=False)
    stored = source.load_stored(nn.unbox(model.abstract_params(denoiser)), denoiser)
    assert "Int8" in type(stored["group_0"]["block_0"]["mixer"]["q"]["kernel"]).__name__


def test_missing_keys_have_the_defaults_of_diffusers(tmp_path):
    signature = inspect.signature(diffusers.DiTTransformer2DModel.__init__)
    defaults = DIFFUSERS["DiTTransformer2DModel"]
    assert defaults == {key: signature.parameters[key].default for key in defaults}
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "DiTTransformer2DModel"}))
    described = convert.open_source(tmp_path, weights=False).model["size"]
    assert "num_layers=28" in described and "dim=1152" in described


@pytest.mark.slow
def test_a_pipeline_is_served_with_its_schedule_and_its_autoencoder(tmp_path):
    """In int8: pictures of its autoencoder, and its loss on latents of the data."""
    folder = folders.pipeline(tmp_path / "pipeline")
    autoencoders.save(folder / "vae")
    values = {"model.pretrained": folder, "data": "glyphs(size=16, letters='abcd', held_out=0.2)", "eval.batches": 1}
    values |= {"train.batch_size": 4, "infer.solver": "ddim(steps=2)", "infer.repeats": 1, "sample.images": 2}
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    argv = [f"--config={runs.ROOT}/configs/infer_images.py:int8", f"--workdir={tmp_path / 'run'}", *flags]
    assert main.main(argv) == 0
    row = read_record(tmp_path / "run" / "record.json")
    assert row["provenance"]["objective"].startswith("ddpm(") and str(folder) in row["provenance"]["autoencoder"]
    assert row["quality"]["eval_loss"] > 0 and row["paper"]["mcr"] > 1 and row["physical"]["decode_s"] > 0
    assert {"000.png", "001.png", "grid.png"} <= {file.name for file in (tmp_path / "run" / "samples").iterdir()}
