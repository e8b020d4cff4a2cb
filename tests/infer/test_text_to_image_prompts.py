"""Pictures and clips of prompts, from command line to files: parts, forms, offloading, meshes, and what is refused."""

import contextlib
import json
import shutil

import jax
import numpy as np
import pytest

from efficientllm import main
from efficientllm.infer import image_samples, offload
from efficientllm.infer.picture_serving import PictureServing
from efficientllm.record.row import read_record
from efficientllm.text_states.states_file import write_states
from infer import pipelines
from infer.pipelines import NEGATIVE, OTHER, PROMPTS, exchange, set_config, without
from tiers import slow_except

pytestmark = pytest.mark.xdist_group("encoders")
PARTS = ("text_encoder_bytes", "resident_weight_bytes", "autoencoder_bytes")


def drawn(serving):
    """The pictures of all requests, and the engine that drew them."""
    with jax.set_mesh(serving.mesh):
        serving.prepare_requests()
        engine = serving.engine(serving.load(serving.config.quant))
        rows = serving.config.infer.batch_size
        batches = image_samples.draw_batches(engine.sampler, engine.params, serving.requests, rows, engine.decode)
        return np.concatenate([*batches]).astype(int), engine


@pytest.mark.slow
def test_a_run_writes_pictures_and_the_bytes_and_times_of_each_part(tmp_path):
    from PIL import Image

    changes = {"sample.images": 2, "infer.batch_size": 3, "infer.offload": True, "seed": 3}
    assert main.main(pipelines.arguments("image", tmp_path / "run", **changes)) == 0
    samples, row = tmp_path / "run" / "samples", read_record(tmp_path / "run" / "record.json")
    assert {file.name for file in samples.iterdir()} == {*(f"00{i}.png" for i in range(4)), "grid.png", "samples.json"}
    pictures = [np.asarray(Image.open(samples / f"00{i}.png")).astype(int) for i in range(4)]
    assert pictures[0].shape == (16, 12, 3)
    assert min(np.abs(a - b).max() for i, a in enumerate(pictures) for b in pictures[:i]) > 5
    assert json.loads((samples / "samples.json").read_text())["prompts"] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    physical, sources = row["physical"], row["sources"]
    assert all(physical[key] > 10_000 for key in PARTS) and "text_encoder_3" in sources[PARTS[0]]["source"]
    assert physical["denoise_s"] + physical["decode_s"] == pytest.approx(physical["image_latency_s"])
    assert physical["offload_s"] is None and "nothing is moved" in sources["offload_s"]["reason"]
    assert row["quality"]["eval_loss"] is None and "not scored" in sources["eval_loss"]["reason"]
    assert row["provenance"]["objective"] == "flow(shift=3.0, label_dropout=0.0)" and row["provenance"]["prompts"] == 2
    expected, _ = drawn(pipelines.described("image", **changes))
    np.testing.assert_array_equal(expected, pictures)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["int8", "bfloat16"])
def test_a_run_writes_clips(form, tmp_path):
    from PIL import Image

    changes = {"infer.fps": 8.0, "text_states": f"encoders(length=20, quant={form!r})"}
    assert main.main(pipelines.arguments("video", tmp_path / "run", form, **changes)) == 0
    samples, row = tmp_path / "run" / "samples", read_record(tmp_path / "run" / "record.json")
    assert len(list(samples.glob("00?.mp4")) + list(samples.glob("00?.webp"))) == 2
    with Image.open(samples / "grid.webp") as grid:
        grid.seek(4)
        grid.load()
        assert grid.n_frames == 5 and grid.info["duration"] == 125
    assert all(row["physical"][key] > 1000 for key in PARTS)


@pytest.mark.slow
def test_offloaded_weights_give_the_same_pictures(monkeypatch):
    whole, _ = drawn(pipelines.described("image"))
    monkeypatch.setattr(offload, "has_host_memory", lambda devices: True)
    serving = pipelines.described("image", **{"infer.offload": True})
    pictures, engine = drawn(serving)
    np.testing.assert_array_equal(pictures, whole)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(engine.params.host)} == {"pinned_host"}
    model, autoencoder = engine.params.group
    assert model._placed is None and autoencoder._placed is not None  # one part at a time
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.host)) + serving.autoencoder_bytes
    readings = offload.readings(serving.moves, 2)
    assert serving.moves.count == 4 and readings["offload_bytes"].value == weights  # two batches of one picture
    assert readings["offload_s"].value > 0


@pytest.mark.slow
def test_states_of_a_folder_and_of_the_cache(tmp_path):
    """The same pictures, and no text is encoded."""
    serving = pipelines.described("image")
    pictures, _ = drawn(serving)
    drawn(serving)  # all states are in the cache now
    assert serving.prompts.readings["text_encode_s"].value is None
    write_states(tmp_path, [*PROMPTS, NEGATIVE], serving.prompts.states)
    of_folder = pipelines.described("image", **{"text_states": f"folder(path={str(tmp_path)!r})"})
    np.testing.assert_array_equal(drawn(of_folder)[0], pictures)
    assert of_folder.prompts.readings["text_encoder_bytes"].value == 0


@pytest.mark.slow
def test_the_negative_prompt_and_left_out_encoders_matter():
    pictures, _ = drawn(pipelines.described("image"))
    others = [
        pipelines.described("image", **{"infer.negative_prompt": ""}),
        pipelines.described("image", **{"text_states": "encoders(length=20, without='text_encoder_3')"}),
    ]
    assert "text_encoder_3" not in others[1].prompts.source.weights_bytes()
    for other in others:
        assert np.abs(drawn(other)[0] - pictures).max() > 2


@pytest.mark.slow
@pytest.mark.parametrize("form", slow_except(("float16", "bfloat16", "int8", "int4", "nf4"), "int8"))
def test_forms_of_the_model_and_of_t5(form, tmp_path):
    weights = f"{form}()" if form in ("int8", "int4", "nf4") else form
    changes = {"text_states": f"encoders(length=20, quant={weights!r})"}
    assert main.main(pipelines.arguments("image", tmp_path / "run", form, **changes)) == 0
    row = read_record(tmp_path / "run" / "record.json")
    physical, whole = row["physical"], pipelines.described("image")
    plain = sum(leaf.size * 4 for leaf in jax.tree.leaves(whole.boxed))
    assert physical["resident_weight_bytes"] < 0.7 * plain
    assert physical["text_encoder_bytes"] < sum(whole.prompts.source.weights_bytes().values())
    assert physical["autoencoder_bytes"] == whole.autoencoder_bytes
    assert all(physical[key] > 0 for key in ("text_encode_s", "denoise_s", "decode_s", "step_s")), row["sources"]


@pytest.mark.slow
def test_eight_devices_draw_the_pictures_of_one():
    """From the same noise bit for bit, whatever the batch; products are summed in another order from there on."""

    def latents(**changes):
        serving = pipelines.described("image", **{"sample.images": 4, "train.batch_size": 8, **changes})
        with jax.set_mesh(serving.mesh):
            serving.prepare_requests()
            params, rows = serving.load(serving.config.quant), serving.config.infer.batch_size
            wanted, key = serving.requests.wanted(np.arange(rows)), jax.random.key(serving.requests.seed)
            shape = image_samples.image_shape(serving.lm)
            begun = np.asarray(serving.sampler.begin(rows, key, shape).x_BhwC)
            sampled = serving.sampler.sample(params, wanted.condition, key, shape, negative=wanted.negative)
            return begun, np.asarray(sampled), np.asarray(serving.decode(sampled))

    begun, sampled, shown = latents(mesh="data=1", **{"infer.batch_size": 2})
    for mesh in ("data=8", "data=2, tensor=2, sequence=2"):
        many_begun, many_sampled, many_shown = latents(mesh=mesh, **{"infer.batch_size": 8})
        np.testing.assert_array_equal(many_begun[:2], begun)
        np.testing.assert_allclose(many_sampled[:2], sampled, atol=1e-4 * np.abs(sampled).max())
        np.testing.assert_allclose(many_shown[:2], shown, atol=1 / 128)
    assert sampled.std() > 0.1 and np.abs(begun[0] - begun[1]).max() > 1


REFUSED = {
    "negative_without_guidance": ({"infer.guidance": 1.0}, None, "config.infer.negative_prompt = 'fog': is not read"),
    "sides": ({"infer.size": (18, 12)}, None, "config.infer.size = (18, 12): height and width must be multiples of 4"),
    "axes": ({"infer.size": (5, 16, 12)}, None, "the model samples pictures; give (height, width)"),
    "long_prompt": ({"infer.prompts": ("fox " * 90,)}, None, "config.infer.prompts: prompt 'fox fox"),
    "no_prompt": ({"infer.prompts": ("empty.txt",)}, None, "holds no prompt"),
    "unknown_encoder": ({"text_states": "encoders(without='text')"}, None, "without = 'text': is none of"),
    "no_text_states": ({"text_states": ""}, None, "no text is read without config.text_states"),
    "no_states": ({"text_states": "folder(path='here')"}, None, "here: no such folder"),
    "no_encoder": ({}, without("text_encoder_2"), "text_encoder_2: is missing"),
    "no_tokenizer": ({}, without("tokenizer_3"), "tokenizer_3: is missing"),
    "no_transformer": ({}, without("transformer"), "transformer/config.json is missing"),
    "no_scheduler": ({}, without("scheduler"), "scheduler_config.json is missing: model_index.json lists a scheduler"),
    "other_transformer": ({}, exchange("transformer"), OTHER),
    "no_vae": ({}, without("vae"), "config.autoencoder = 'pixels': the model samples latents of 4 channels"),
    "other_vae": ({}, exchange("vae"), 'config.autoencoder = "wan(path='),
    "vae_of_other_channels": ({}, set_config("vae", latent_channels=8), "latents have 8 channels, and the model"),
    "vae_of_other_tensors": ({}, set_config("vae", block_out_channels=[8, 32]), 'config.autoencoder = "kl('),
    "encoder_of_other_width": ({}, set_config("transformer", joint_attention_dim=36), "part of another model"),
    "t5_of_other_width": ({}, set_config("text_encoder_3", d_model=48), "has states of width 48, and the transformer"),
}


QUICK = ("sides", "long_prompt", "no_vae", "no_tokenizer", "no_scheduler", "other_transformer")


@pytest.mark.parametrize("case", slow_except(list(REFUSED), *QUICK))
def test_bad_input_is_one_line_and_status_2(case, tmp_path, monkeypatch, capsys):
    changes, change, message = REFUSED[case]
    if change is not None:
        folder = shutil.copytree(pipelines.folder("image"), tmp_path / "pipeline")
        change(folder)
        changes = changes | {"model.pretrained": str(folder)}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    monkeypatch.setattr(PictureServing, "prepare_requests", lambda _: pytest.fail("compiled"))
    argv = pipelines.arguments("image", tmp_path / "run", **changes)
    capsys.readouterr()  # progress of writing the pipelines
    with contextlib.suppress(FileNotFoundError):
        assert main.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error


@pytest.mark.slow
def test_a_prompt_that_is_cut_is_named(tmp_path, capsys):
    """By the first encoder that it is too long for, as diffusers warns of it; CLIP's read 77 tokens, T5 has 20 here."""
    changes = {"infer.prompts": ("fox " * 90, "a fox"), "text_states": "encoders(length=20, truncate=True)"}
    assert main.main(pipelines.arguments("image", tmp_path / "run", **changes)) == 0
    output = capsys.readouterr()
    for tokenizer, most in (("tokenizer", 77), ("tokenizer_2", 77), ("tokenizer_3", 20)):
        cut = f"tokens of {tokenizer}, and its encoder reads {most} at most, start and end included: it is cut"
        assert (output.out + output.err).count(cut) == 1


@pytest.mark.slow
def test_frames_that_do_not_fit_are_refused(tmp_path, capsys):
    assert main.main(pipelines.arguments("video", tmp_path / "run", **{"infer.size": (6, 16, 16)})) == 2
    assert "config.infer.size = (6, 16, 16): a clip has 1 frame more than a multiple of 2; take 5 or 7" in (
        capsys.readouterr().err
    )
