"""Vision-language models against transformers in float32: features, logits, positions, and files in both directions."""

import json
import re
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import vision_folders as folders
from convert.vision_folders import IMAGE, torch
from efficientllm import convert, model
from efficientllm.convert import __main__ as command
from efficientllm.convert import check_internvl, check_vision
from efficientllm.convert.check_vision import logits_of, reference_inputs
from efficientllm.embeds.vision_language import encode_images
from efficientllm.errors import UserError
from efficientllm.vision.token_rows import Prompt, make_batch, token_positions, token_row
from efficientllm.vision.tower_rows import tower_rows
from tiers import slow_except

pytestmark = pytest.mark.xdist_group("vision")

TOLERANCE = 1e-5  # float32 rounding of features of some 3
NAMES = slow_except(folders.MODELS, "qwen2.5", "internvl")
_LOADED = {}


def loaded(name):
    if name not in _LOADED:
        source = convert.open_source(folders.saved(name))
        lm = source.lm()
        _LOADED[name] = source, lm, source.load(nn.unbox(model.abstract_params(lm)))
    return _LOADED[name]


def prompts(name, grids=folders.GRIDS, seed=0):
    """Two records: text and two images, and a shorter one with one image first."""
    random, images = np.random.default_rng(seed), folders.pictures(name, grids)
    text = [random.integers(0, IMAGE, size).tolist() for size in (5, 3, 4, 6)]
    return [
        Prompt([*text[0], IMAGE, *text[1], IMAGE, *text[2]], images[:2], "first"),
        Prompt([IMAGE, *text[3]], images[2:], "second"),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_features_of_towers(name):
    """Of images in two rows: windows at the edges, frames, tiles; padding of the shorter row changes nothing."""
    _, lm, params = loaded(name)
    images = folders.pictures(name)
    rows = tower_rows(lm.vision, [images[:2], images[2:]])
    features = np.asarray(jax.jit(lambda params, patches: encode_images(lm, params, patches))(params, rows.patches))
    actual = np.concatenate([row[np.concatenate(slots)] for row, slots in zip(features, rows.slots, strict=True)])
    np.testing.assert_allclose(actual, folders.features(name, lm, images), atol=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_rows_with_images(name):
    """Several images of different sizes in a row, and a shorter row with padding, in one pass."""
    _, lm, params = loaded(name)
    grids = [(1, 10, 14), (1, 8, 4), (1, 6, 4)]
    rows = prompts(name, grids)
    made = make_batch(lm, rows)
    logits = jax.jit(lm.apply)({"params": params}, jnp.asarray(made.tokens_BT), made.ctx)[0]
    expected = logits_of(folders.reference(name), lm, made, rows)
    for i, row in enumerate(made.rows):
        length = len(row.ids_T)
        assert np.abs(logits[i, :length] - expected[i, :length]).max() <= 1e-4 * np.abs(expected).max()
    text = [[3, 4, 5]]
    made = make_batch(lm, [Prompt(text[0])])
    alone = lm.apply({"params": params}, jnp.asarray(text), made.ctx)[0]
    of_text = logits_of(folders.reference(name), lm, made, [])
    np.testing.assert_allclose(alone, of_text, atol=1e-4 * np.abs(of_text).max())


@pytest.mark.parametrize("name", ["qwen2.5", "qwen2"])
def test_positions_are_those_of_transformers(name):
    """Of text and images in turn, the position after them, and padded rows."""
    _, lm, _ = loaded(name)
    rows = prompts(name, [(1, 10, 14), (1, 8, 4), (1, 4, 6)])
    inputs = reference_inputs(lm, make_batch(lm, rows), rows)
    expected, deltas = folders.reference(name).model.get_rope_index(
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    for i, row in enumerate(token_row(lm, prompt) for prompt in rows):
        np.testing.assert_array_equal(row.coordinates_TA.T, expected[:, i, : len(row.ids_T)].numpy())
        assert row.delta == int(deltas[i])


def test_positions_of_one_axis_are_numbers():
    coordinates_TA, following = token_positions(np.array([-1, 0, 0, -1]), [(1, 1, 2)], 1)
    assert coordinates_TA.tolist() == [[0], [1], [2], [3]] and following == 4


@pytest.mark.parametrize("name", NAMES)
def test_files_byte_by_byte(name, tmp_path):
    """Written folders load in transformers and give its logits; tensors that are not read are kept."""
    source, lm, params = loaded(name)
    convert.convert(source, tmp_path / "converted")
    convert.export(lm, params, tmp_path / "exported", source)
    exported, converted = (load_file(tmp_path / way / "model.safetensors") for way in ("exported", "converted"))
    assert exported.keys() == converted.keys()
    assert all(np.array_equal(exported[tensor], converted[tensor]) for tensor in converted)
    reference = folders.reference(name)
    again, report = type(reference).from_pretrained(tmp_path / "converted", output_loading_info=True)
    assert not any(report.values()), report
    for (path, ours), (_, tensor) in zip(again.named_parameters(), reference.named_parameters(), strict=True):
        assert torch.equal(ours, tensor), path
    assert convert.open_source(tmp_path / "converted").model == source.model
    with pytest.raises(UserError, match="is written like the one that it was read from"):
        convert.export(lm, params, tmp_path / "named", source.config["model_type"])


@pytest.mark.parametrize("name", slow_except(["qwen2.5", "qwen2", "llava", "internvl"], "qwen2.5", "llava"))
def test_the_command_checks(name, tmp_path, capsys, monkeypatch):
    """On pictures that it draws, of config.json and weights alone; a model with another projector is not equal."""
    for file in ("config.json", "model.safetensors"):
        shutil.copy(folders.saved(name) / file, tmp_path)
    assert command.main(["check", str(tmp_path)]) == 0
    numbers = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert float(numbers["max logit difference"]) <= 1e-4 * float(numbers["max logit"])
    assert float(numbers["image tokens"]) > 0 and float(numbers["same first choice"]) == 1

    def other(source):
        reference = folders.build(name)
        with torch.no_grad():
            reference.model.multi_modal_projector.linear_1.weight.mul_(1.1)
        return reference

    if name == "llava":
        monkeypatch.setattr(check_vision, "load_reference", other)
        assert command.main(["check", str(tmp_path)]) == 1


@pytest.mark.parametrize("name", slow_except(folders.MODELS, "qwen2.5-tied", "llava"))
def test_names_in_memory(name, tmp_path):
    """Some files have the names that parameters have in transformers' memory."""
    shutil.copy(folders.saved(name) / "config.json", tmp_path)
    tensors = {key: tensor.numpy().copy() for key, tensor in folders.reference(name).state_dict().items()}
    assert "model.language_model.norm.weight" in tensors
    save_file(tensors, tmp_path / "model.safetensors")
    _, lm, expected = loaded(name)
    params = convert.open_source(tmp_path).load(nn.unbox(model.abstract_params(lm)))
    jax.tree.map(np.testing.assert_array_equal, params, expected)


_PUBLISHED = (
    (r"^vision_tower\.embeddings\.cls_token", "vision_model.embeddings.class_embedding"),
    (r"^vision_tower\.embeddings\.position_embeddings", "vision_model.embeddings.position_embedding"),
    (r"^vision_tower\.embeddings\.patch_embeddings\.projection", "vision_model.embeddings.patch_embedding"),
    (r"^vision_tower\.encoder\.layer\.(\d+)\.attention\.projection_layer", r"vision_model.encoder.layers.\1.attn.proj"),
    (r"^vision_tower\.encoder\.layer\.(\d+)\.attention\.", r"vision_model.encoder.layers.\1.attn."),
    (r"^vision_tower\.encoder\.layer\.(\d+)\.layernorm_before", r"vision_model.encoder.layers.\1.norm1"),
    (r"^vision_tower\.encoder\.layer\.(\d+)\.layernorm_after", r"vision_model.encoder.layers.\1.norm2"),
    (r"^vision_tower\.encoder\.layer\.(\d+)\.lambda_", r"vision_model.encoder.layers.\1.ls"),
    (r"^vision_tower\.encoder\.layer\.", "vision_model.encoder.layers."),
    (r"^multi_modal_projector\.layer_norm", "mlp1.0"),
    (r"^multi_modal_projector\.linear_1", "mlp1.1"),
    (r"^multi_modal_projector\.linear_2", "mlp1.3"),
)


def published(folder):
    """The folder of `internvl` with OpenGVLab's names: queries, keys and values are rows of one tensor."""
    source, _, _ = loaded("internvl")
    tensors = {}
    for stored in source.tensors.shapes:
        name = stored
        for pattern, replacement in _PUBLISHED:
            name = re.sub(pattern, replacement, name)
        tensors[name] = np.ascontiguousarray(source.tensors.read(stored))
    for layer in range(2):
        stem = f"vision_model.encoder.layers.{layer}.attn."
        tensors[f"{stem}qkv.weight"] = np.concatenate([tensors.pop(f"{stem}{name}_proj.weight") for name in "qkv"])
    vision = source.config["vision_config"]
    own = {key: vision[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    config = {"model_type": "internvl_chat", "llm_config": source.config["text_config"], "image_token_id": IMAGE}
    config |= {"vision_config": own | {"image_size": 56, "patch_size": 14}, "ps_version": "v2"}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"downsample_ratio": 0.5}))
    return folder


def test_internvl_as_it_was_published(tmp_path, capsys):
    """The same parameters as of transformers' folder; written with the same names; checked with transformers' class."""
    source = convert.open_source(published(tmp_path / "published"))
    lm = source.lm()
    params = source.load(nn.unbox(model.abstract_params(lm)))
    _, expected_lm, expected = loaded("internvl")
    assert lm == expected_lm
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    convert.convert(source, tmp_path / "converted")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("published", "converted"))
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)
    assert command.main(["check", str(tmp_path / "published")]) == 0
    numbers = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert float(numbers["max logit difference"]) <= 1e-4 * float(numbers["max logit"])
    assert float(numbers["image tokens"]) > 0


def test_a_published_folder_that_no_class_computes_is_named(tmp_path, capsys):
    """transformers' norms of queries and keys have one epsilon."""
    folder = published(tmp_path / "published")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["layer_norm_eps"] = 1e-5
    (folder / "config.json").write_text(json.dumps(config))
    assert command.main(["check", str(folder)]) == 2
    assert re.search("layer_norm_eps = 1e-05: .* it cannot compare", capsys.readouterr().err)


def test_a_published_model_is_compared_by_its_own_tensors(tmp_path, monkeypatch):
    """Values that differ are found: the reference's tensors come from the file by names of its own."""
    folder = published(tmp_path / "published")
    source = convert.open_source(folder)
    reference = check_internvl.build_reference(source)
    with torch.no_grad():
        reference.model.multi_modal_projector.linear_1.weight.mul_(1.1)
    monkeypatch.setattr(check_internvl, "build_reference", lambda source: reference)
    assert command.main(["check", str(folder)]) == 1
