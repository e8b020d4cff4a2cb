"""Folders of text encoders: what is refused, what the command says, and defaults of missing keys."""

import dataclasses
import json

import flax.linen as nn
import numpy as np
import pytest

from convert import encoder_folders as folders
from convert.denoiser_folders import edit
from convert.encoder_folders import transformers
from efficientllm import convert, model
from efficientllm.convert import __main__ as command
from efficientllm.convert import check_text_encoder
from efficientllm.convert.hf_config.class_defaults import ENCODERS
from efficientllm.errors import UserError
from efficientllm.registry import build
from tiers import slow_case

pytestmark = pytest.mark.xdist_group("encoders")

CLIP_EMBEDDING, T5_EMBEDDING = "text_model.embeddings.token_embedding.weight", "shared.weight"
TABLE = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"


def read(folder):
    source = convert.open_source(folder)
    return source.bind(source.lm())


@pytest.mark.parametrize(
    "name, config, tensors, message",
    [
        ("t5", {"model_type": "byt5"}, {}, "model_type = 'byt5' is none of llama, .*umt5; did you mean"),
        ("t5", {"feed_forward_proj": "relu"}, {}, 'feed_forward_proj = "relu" is not supported: known are gated-gelu'),
        ("t5", {"dense_act_fn": "relu"}, {}, 'dense_act_fn = "relu" is not supported: known are gelu_new'),
        ("t5", {"is_gated_act": False}, {}, "is_gated_act = false is not supported"),
        ("t5", {"num_layers": 4}, {}, "tensor 'encoder.block.3.* is missing"),
        ("t5", {"d_kv": -1}, {}, "d_kv = -1: must be a whole number"),
        ("t5", {"relative_attention_max_distance": 16}, {}, "t5: max_distance = 16 must be above num_buckets / 2"),
        ("t5", {"sliding_window": 5}, {}, "sliding_window = 5 is not supported"),
        ("t5", {}, {TABLE: np.zeros((32, 3), np.float32)}, f"tensor '{TABLE}' belongs to nothing"),
        ("t5", {}, {"encoder.embed_tokens.weight": np.zeros((96, 24), np.float32)}, "is not 'shared.weight'"),
        ("umt5", {}, {TABLE: None}, rf"tensor '{TABLE}' of shape \[32, 3\] is missing"),
        ("clip-quick", {"hidden_act": "relu"}, {}, 'hidden_act = "relu" is not supported: known are quick_gelu'),
        ("clip-quick", {"num_attention_heads": 5}, {}, "num_attention_heads = 5 does not divide hidden_size = 24"),
        ("clip-quick", {"eos_token_id": [1, 2]}, {}, r"eos_token_id = \[1, 2\] is not supported"),
        (
            "clip-quick",
            {"projection_dim": 8},
            {},
            r"'text_projection.weight' has shape \[20, 24\], the config asks for",
        ),
        ("clip-quick", {"architectures": ["CLIPTextModel"]}, {}, "'text_projection.weight' belongs to nothing"),
        ("clip-quick", {"architectures": ["CLIPModel"]}, {}, r'architectures = \["CLIPModel"\] is not supported'),
        ("t5", {"architectures": ["T5ForConditionalGeneration"]}, {}, "known of this family are T5EncoderModel"),
        ("clip-quick", {"max_position_embeddings": 9}, {}, "the config asks for"),
    ],
)
def test_what_is_refused(name, config, tensors, message, tmp_path):
    folder = edit(folders.saved(name), tmp_path / "edited", config, **tensors)
    with pytest.raises(UserError, match=message) as refused:
        read(folder)
    assert "\n" not in str(refused.value)


def test_files_of_other_versions(tmp_path):
    """A second copy of the embedding, a buffer of positions, and names without a prefix."""
    embedding = folders.reference("t5").shared.weight.detach().numpy()
    assert read(edit(folders.saved("t5"), tmp_path / "t5", **{"encoder.embed_tokens.weight": embedding}))
    positions = {"text_model.embeddings.position_ids": np.arange(24)[None]}
    assert read(edit(folders.saved("clip-quick"), tmp_path / "clip", **positions))
    assert read(folders.saved("clip-plain"))  # as transformers 5 writes it


@pytest.mark.parametrize("name", ["clip-erf", slow_case("clip-plain"), slow_case("umt5")])
def test_the_command_checks_and_converts(name, tmp_path, capsys, monkeypatch):
    folder = folders.saved(name)
    assert command.main(["check", str(folder)]) == 0
    printed = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert float(printed["max difference"]) < 1e-5 * float(printed["max state"])
    assert command.main([str(folder), f"--out={tmp_path / 'out'}", "--dtype=bfloat16"]) == 0
    assert "bfloat16" in capsys.readouterr().out
    assert convert.open_source(tmp_path / "out").stored_dtype == "bfloat16"
    encode = check_text_encoder.encode_with

    def encode_differently(*arguments):
        states_BTD, pooled_BD = encode(*arguments)
        return check_text_encoder.EncodedText(1.01 * states_BTD, pooled_BD)

    monkeypatch.setattr(check_text_encoder, "encode_with", encode_differently)
    assert command.main(["check", str(folder)]) == 1


def test_the_check_compares_vectors_of_texts(monkeypatch):
    encode = check_text_encoder.encode_with

    def encode_differently(*arguments):
        states_BTD, pooled_BD = encode(*arguments)
        return check_text_encoder.EncodedText(states_BTD, 1.01 * pooled_BD)

    monkeypatch.setattr(check_text_encoder, "encode_with", encode_differently)
    assert command.main(["check", str(folders.saved("clip-quick"))]) == 1


def test_check_without_torch(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert command.main(["check", str(folders.saved("t5"))]) == 2
    assert "check compares with transformers on torch: pip install" in capsys.readouterr().err


@pytest.mark.parametrize("spec", ["int8()", slow_case("int4()"), slow_case("nf4()")])
def test_quantized_folders_are_read_again(spec, tmp_path):
    arguments = [str(folders.saved("clip-quick")), f"--quant={spec}", f"--out={tmp_path / 'out'}"]
    assert command.main(arguments) == 0
    source = convert.open_source(tmp_path / "out")
    encoder = source.lm(scan=False)
    stored = source.load_stored(nn.unbox(model.abstract_params(encoder)), encoder)
    kinds = [type(stored["group_0"]["block_0"]["mixer"]["q"]["kernel"]), type(stored["projection"]["kernel"])]
    assert kinds[0] is kinds[1] and kinds[0].__name__.lower() == spec.partition("(")[0]


@pytest.mark.parametrize("model_type", ENCODERS)
def test_missing_keys_have_the_defaults_of_transformers(model_type):
    config_class = transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type]
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    assert ENCODERS[model_type] == {key: defaults[key] for key in ENCODERS[model_type]}


def test_a_folder_without_other_keys(tmp_path):
    for name, config in {"clip": {"model_type": "clip_text_model"}, "umt5": {"model_type": "umt5"}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        assert "dim=512" in convert.open_source(tmp_path / name, weights=False).model["size"]


def test_objectives_of_language_models_refuse_an_encoder():
    encoder = convert.open_source(folders.saved("t5")).lm()
    with pytest.raises(UserError, match="NextToken learns from text; config.model.embed reads prompts"):
        build("objective", "next_token()").check(encoder)
