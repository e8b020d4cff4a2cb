"""Text states against diffusers' pipelines in float32; encoders that are left out, or belong to another model."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from convert.encoder_folders import torch
from efficientllm.errors import UserError
from efficientllm.text_states import pipelines
from efficientllm.text_states.cached import CachedEncoders, StatesFolder
from efficientllm.text_states.pipelines import clean_prompt, open_prompt_encoders
from efficientllm.text_states.states_file import TextStates, file_name, write_states
from text_states import pipeline_folders as folders
from tiers import slow_case

pytestmark = pytest.mark.xdist_group("encoders")

PROMPTS = ["a red fox, running.", "", "a fox &amp; a  bear"]
TOLERANCE = 1e-5  # float32 rounding of states of some 3


def by_diffusers(pipeline, **arguments):
    """Embeddings of PROMPTS and of an empty negative prompt, as numpy arrays."""
    with torch.no_grad():
        encoded = pipeline.encode_prompt(prompt=PROMPTS, negative_prompt=[""] * 3, device="cpu", **arguments)
    return [array.numpy() for array in encoded]


def by_sd3(with_t5):
    return by_diffusers(folders.stable_diffusion_3(with_t5), prompt_2=None, prompt_3=None)


@pytest.mark.parametrize("with_t5", [True, slow_case(False)])
def test_stable_diffusion_3(with_t5):
    text, no_text, pooled, no_pooled = by_sd3(with_t5)
    encoders = open_prompt_encoders(str(folders.saved(folders.stable_diffusion_3, with_t5)))
    states = encoders.encode(PROMPTS)
    assert states.text_BSE.shape == (3, 77 + 256, 40) and states.pooled_BE.shape == (3, 28)
    np.testing.assert_allclose(states.text_BSE, text, atol=TOLERANCE)
    np.testing.assert_allclose(states.pooled_BE, pooled, atol=TOLERANCE)
    np.testing.assert_allclose(states.text_BSE[1], no_text[0], atol=TOLERANCE)
    np.testing.assert_allclose(states.pooled_BE[1], no_pooled[0], atol=TOLERANCE)
    assert np.abs(text[:, 77:]).max() > 1 if with_t5 else not states.text_BSE[:, 77:].any()


def test_wan():
    text, no_text = by_diffusers(folders.wan(), max_sequence_length=512)
    states = open_prompt_encoders(str(folders.saved(folders.wan))).encode(PROMPTS)
    assert states.pooled_BE is None and states.text_BSE.shape == (3, 512, 40)
    np.testing.assert_allclose(states.text_BSE, text, atol=TOLERANCE)
    np.testing.assert_array_equal(states.text_BSE == 0, text == 0)
    np.testing.assert_allclose(states.text_BSE[1], no_text[0], atol=TOLERANCE)


def test_encoders_that_are_left_out_give_zeros(tmp_path):
    """Each in its place; without any, no file of an encoder is needed."""
    source = folders.saved(folders.stable_diffusion_3)
    text, _, pooled, _ = by_sd3(True)
    for name, columns in (("text_encoder", slice(0, 12)), ("text_encoder_2", slice(12, 28))):
        states = open_prompt_encoders(str(source), without=(name,)).encode(PROMPTS)
        expected_text, expected_pooled = text.copy(), pooled.copy()
        expected_text[:, :77, columns] = expected_pooled[:, columns] = 0
        np.testing.assert_allclose(states.text_BSE, expected_text, atol=TOLERANCE)
        np.testing.assert_allclose(states.pooled_BE, expected_pooled, atol=TOLERANCE)
    (tmp_path / "transformer").mkdir()
    for file in ("model_index.json", "transformer/config.json"):
        shutil.copyfile(source / file, tmp_path / file)
    encoders = open_prompt_encoders(str(tmp_path), without=pipelines.StableDiffusion3.names)
    states = encoders.encode(PROMPTS)
    assert states.text_BSE.shape == text.shape and states.pooled_BE.shape == pooled.shape
    assert not states.text_BSE.any() and not states.pooled_BE.any()


@pytest.mark.slow
def test_forms_of_weights_and_precision():
    """T5's in int8 moves its own states alone; bfloat16 moves all by roundings of 2^-9."""
    folder = str(folders.saved(folders.stable_diffusion_3))
    text, _, pooled, _ = by_sd3(True)
    rounded = open_prompt_encoders(folder, quant={"text_encoder_3": "int8()"}).encode(PROMPTS)
    np.testing.assert_allclose(rounded.text_BSE[:, :77], text[:, :77], atol=TOLERANCE)
    error = np.linalg.norm(rounded.text_BSE - text) / np.linalg.norm(text)
    assert 1e-4 < error < 0.1
    half = open_prompt_encoders(folder, precision="bfloat16", without=("text_encoder_3",)).encode(PROMPTS)
    assert half.text_BSE.dtype.name == half.pooled_BE.dtype.name == "bfloat16"
    error = np.linalg.norm(half.pooled_BE.astype(np.float32) - pooled) / np.linalg.norm(pooled)
    assert 1e-4 < error < 0.05


def test_longer_prompts():
    """Refused in one line; cut where that is asked for, as diffusers does."""
    folder, prompt = str(folders.saved(folders.wan)), "a fox " * 300
    with pytest.raises(UserError, match=r"prompt 'a fox .*: \d+ tokens of tokenizer, and its encoder reads 512 at"):
        open_prompt_encoders(folder).encode([prompt])
    cut = open_prompt_encoders(folder, truncate=True, length=16).encode([prompt]).text_BSE
    with torch.no_grad():
        expected, _ = folders.wan().encode_prompt(
            prompt, max_sequence_length=16, do_classifier_free_guidance=False, device="cpu"
        )
    np.testing.assert_allclose(cut, expected.numpy(), atol=TOLERANCE)
    with pytest.raises(UserError, match="tokens of tokenizer, and its encoder reads 77 at most, start and end"):
        open_prompt_encoders(str(folders.saved(folders.stable_diffusion_3))).encode(["a fox " * 80])


def test_what_is_refused(tmp_path):
    source = folders.saved(folders.stable_diffusion_3)

    def refused(message, change=lambda folder: None, **fields):
        folder = folders.copied(source, tmp_path / str(len(list(tmp_path.iterdir()))))
        change(folder)
        with pytest.raises(UserError, match=message) as error:
            open_prompt_encoders(str(folder), **fields).encode(PROMPTS)
        assert "\n" not in str(error.value)

    def set_config(part, **values):
        def change(folder):
            file = folder / part
            file.write_text(json.dumps(json.loads(file.read_text()) | values))

        return change

    refused("text_encoder_2: is missing; name the folder of a whole", lambda f: shutil.rmtree(f / "text_encoder_2"))
    refused("tokenizer_3: is missing", lambda f: shutil.rmtree(f / "tokenizer_3"))
    refused("no model_index.json in it", lambda f: (f / "model_index.json").unlink())
    refused("config.json is missing", lambda f: (f / "transformer" / "config.json").unlink())
    refused("_class_name = 'FluxPipeline': the texts of", set_config("model_index.json", _class_name="FluxPipeline"))
    config = "transformer/config.json"
    refused("T5|reads joint_attention_dim = 36: it is a part of another", set_config(config, joint_attention_dim=36))
    refused(r"have 12 \+ 16 numbers, and the transformer reads 30", set_config(config, pooled_projection_dim=30))
    refused("pooled_projection_dim = None: must be a width", set_config(config, pooled_projection_dim=None))
    refused("has no encoder 'text_encoder_4'; known: .* did you mean", without=("text_encoder_4",))

    def exchange(folder):
        shutil.rmtree(folder / "tokenizer_3")
        shutil.copytree(folder / "tokenizer", folder / "tokenizer_3")

    refused("has the id 81, and its encoder 45 tokens: it is the tokenizer of another model", exchange)

    def denoiser(folder):
        shutil.rmtree(folder / "text_encoder")
        shutil.copytree(folders.saved(folders.wan) / "text_encoder", folder / "text_encoder")

    refused("text_encoder: reads texts of any length; say how many", denoiser)


def test_states_are_cached(tmp_path, monkeypatch):
    """Once for each prompt; others for other encoders, lengths and forms; again where a file is damaged."""
    folder = folders.copied(folders.saved(folders.wan), tmp_path / "wan")
    encoders = dataclasses.replace(open_prompt_encoders(str(folder)), length=24)
    encode, encoded = pipelines.Wan.encode, []

    def count(self, prompts):
        encoded.append(tuple(prompts))
        return encode(self, prompts)

    monkeypatch.setattr(pipelines.Wan, "encode", count)
    cached = CachedEncoders(encoders, tmp_path / "cache")
    first = cached.encode(PROMPTS[:2])
    again = cached.encode([*PROMPTS, PROMPTS[0]])
    assert encoded == [tuple(PROMPTS[:2]), (PROMPTS[2],)]
    np.testing.assert_array_equal(again.text_BSE[[0, 1, 3]], first.text_BSE[[0, 1, 0]])
    np.testing.assert_array_equal(first.text_BSE, encode(encoders, PROMPTS[:2]).text_BSE)
    for changed in ({"length": 25}, {"without": ("text_encoder",)}):
        CachedEncoders(dataclasses.replace(encoders, **changed), tmp_path / "cache").encode(PROMPTS[:1])
    assert len(encoded) == 4
    file = next((tmp_path / "cache").glob(f"text-states-*/{file_name(PROMPTS[2])}"))
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    np.testing.assert_array_equal(cached.encode(PROMPTS[2:]).text_BSE, again.text_BSE[2:3])
    assert len(encoded) == 5
    weights = folder / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")  # another number of a norm
    cached.encode(PROMPTS[:1])
    assert len(encoded) == 6


def test_a_folder_of_the_users(tmp_path):
    draw = np.random.default_rng(0)
    states = TextStates(draw.normal(size=(2, 5, 4)).astype(np.float32), draw.normal(size=(2, 3)).astype(np.float32))
    write_states(tmp_path, PROMPTS[:2], states)
    read = StatesFolder(tmp_path).encode([PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    np.testing.assert_array_equal(read.text_BSE, states.text_BSE[[1, 0, 1]])
    np.testing.assert_array_equal(read.condition.pooled_BE, states.pooled_BE[[1, 0, 1]])

    def refused(message, prompts, text=None, pooled=None):
        if text is not None:
            write_states(tmp_path, [PROMPTS[2]], TextStates(text[None], None if pooled is None else pooled[None]))
        with pytest.raises(UserError, match=message):
            StatesFolder(tmp_path).encode(prompts)

    refused("has no states of prompt 'a bear', a file [0-9a-f]{64}.safetensors", ["a bear"])
    pair = [PROMPTS[0], PROMPTS[2]]
    refused("'text' is float32 .6, 4., that of the first prompt float32 .5, 4.", pair, np.ones((6, 4), np.float32))
    refused("'pooled' is missing, that of the first prompt float32 .3.", pair, np.ones((5, 4), np.float32))
    refused("needs 'text', floats with 2 axes", pair, np.ones((5, 4), np.int32))
    refused("tensor 'text' has values that are not finite", pair, np.full((5, 4), np.nan, np.float32))
    refused("no prompt: give one at least", [])
    with pytest.raises(UserError, match="no such folder; it holds a file of states for each prompt"):
        StatesFolder(tmp_path / "none").encode(PROMPTS)


def test_prompts_of_wan_are_cleaned():
    assert clean_prompt(" a  fox &amp;amp;\n b ") == "a fox & b"
