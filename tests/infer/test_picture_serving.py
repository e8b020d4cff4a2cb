"""Inference runs of a diffusion model: pictures, the row, forms of the weights, and what is refused."""

import contextlib
import json
import os
import signal

import flax.linen as nn
import jax
import numpy as np
import pytest

import runs
from autoencoders import folders
from efficientllm import convert, main, model, sharding
from efficientllm.config.presets import infer_images as preset
from efficientllm.convert import run_parameters
from efficientllm.cost import jaxpr_flops
from efficientllm.evaluation import own_features, sample_quality
from efficientllm.infer import image_samples, setup
from efficientllm.objectives.flow import Flow
from efficientllm.record.row import read_record
from tiers import slow_except

pytestmark = [pytest.mark.quick, pytest.mark.xdist_group("picture_serving")]
SIZE = "custom(num_layers=2, dim=32, num_heads=2, num_kv_heads=1, head_dim=16, hidden=64, rope_base=1e4)"
DATA = "glyphs(size=16, channels=1, letters='abcd', held_out=0.2)"
MODEL = {
    "model.size": SIZE,
    "model.embed": "patches(patch=4)",
    "model.modulation": "linear",
    "model.position": "sincos2d",
    "model.norm": "layernorm",
    "model.mixer": "mha",
    "model.ffn": "gelu",
    "model.tied": False,
}


def argv(config, workdir, values):
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    return [f"--config={runs.ROOT}/configs/{config}", f"--workdir={workdir}", *flags]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of three steps, whose average lags behind."""
    workdir = tmp_path_factory.mktemp("pictures") / "run"
    values = MODEL | {"objective": "flow()", "data": DATA, "train.steps": 3, "train.batch_size": 8, "train.ema": 0.5}
    values |= {"eval.batches": 1, "sample.images": 4, "infer.solver": "euler(steps=3)", "train.log_every": 1}
    values |= {"train.schedule": "constant(peak=0.01)", "mesh": "data=1"}
    with pytest.MonkeyPatch.context() as patch:
        mesh = sharding.make_mesh
        patch.setattr(sharding, "make_mesh", lambda spec, _: mesh(spec, jax.devices()[:1]))
        assert main.main(argv("base.py", workdir, values)) == 0
    return workdir


def serve(trained, workdir, form="float32", **overrides):
    values = {
        "model.pretrained": trained,
        "data": DATA,
        "eval.batches": 1,
        "train.batch_size": 8,
        "sample.images": 4,
        "infer.batch_size": 2,
        "infer.repeats": 2,
        "infer.solver": "euler(steps=3)",
        "infer.guidance": 1.0,
    } | {key.replace("__", "."): value for key, value in overrides.items()}
    return main.main(argv(f"infer_images.py:{form}", workdir, values))


def test_a_row_holds_time_bytes_flops_and_quality(trained, tmp_path, capsys):
    assert serve(trained, tmp_path / "run", infer__guidance=2.0) == 0
    row, printed = read_record(tmp_path / "run" / "record.json"), capsys.readouterr().out
    physical, study = row["physical"], row["paper"]
    assert (row["outcome"], row["task"]) == ("ok", "infer")
    assert physical["images_per_s"] == pytest.approx(2 / physical["image_latency_s"])
    assert physical["step_s"] == pytest.approx(physical["image_latency_s"] / 3) and physical["step_s_p50"] > 0
    assert study["it_tokens_per_s"] > 0 and "generated images" in row["sources"]["it_tokens_per_s"]["source"]
    assert physical["ttft_s"] is None and "none of its tokens" in row["sources"]["ttft_s"]["reason"]
    assert study["mcr"] == pytest.approx(1) and "likelihood a pixel" in row["sources"]["mcr"]["source"]
    assert row["provenance"]["objective"] == "flow()" and "Euler(steps=3" in row["provenance"]["solver"]
    assert "a picture" in printed and "a solver step" in printed and "TTFT" not in printed
    # The evaluation and the pictures are those of the run's own average.
    before = read_record(trained / "record.json")["quality"]
    losses = {key: row["quality"][key] for key in before if key.startswith("eval_loss")}
    assert len(losses) == 8 and losses == pytest.approx({key: before[key] for key in losses}, rel=1e-5)


@pytest.mark.slow
def test_the_pictures_are_those_of_the_training_run(trained, tmp_path):
    from PIL import Image

    assert serve(trained, tmp_path / "run", infer__batch_size=3, eval__batches=1, train__batch_size=3) == 0
    samples = tmp_path / "run" / "samples"
    assert sorted(file.name for file in samples.glob("0*")) == ["000.png", "001.png", "002.png", "003.png"]
    grid, before = (np.asarray(Image.open(folder / "grid.png")) for folder in (samples, trained / "samples"))
    assert np.asarray(Image.open(samples / "000.png")).shape == (16, 16)
    assert np.abs(grid.astype(int) - before).max() <= 1 and grid.std() > 10


def test_the_parameters_are_the_average(trained):
    average = run_parameters.newest_parameters(trained / "checkpoints")
    source = convert.open_source(trained)
    assert source.objective() == "flow()" and "side=16, channels=1, classes=4" in source.model["embed"]
    np.testing.assert_array_equal(source.tensors.read("final/kernel"), average["final/kernel"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_parameters, "AVERAGE", "none of that name")
        last = run_parameters.newest_parameters(trained / "checkpoints")
    assert average.keys() == last.keys() and np.abs(average["final/kernel"] - last["final/kernel"]).max() > 0


def described(trained, **changes):
    config = preset.get_config("float32")
    values = {"model.pretrained": str(trained), "data": DATA, "infer.solver": "euler(steps=3)"}
    config.update_from_flattened_dict(values | changes)
    return setup.prepare(config)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_flops_of_a_picture_are_those_of_the_program(guidance, trained):
    serving = described(trained, **{"infer.guidance": guidance})
    sampler, abstract, costs = serving.sampler, nn.unbox(serving.boxed), serving.costs
    traced = sampler.trace(abstract, 2, image_samples.image_shape(serving.lm))
    assert jaxpr_flops.count_program_flops(traced.jaxpr) == 2 * costs.image_flops == 2 * 3 * costs.step_flops
    program = sampler.trace(abstract, 2, image_samples.image_shape(serving.lm), count=1)
    assert jaxpr_flops.count_program_flops(program.jaxpr) == 2 * costs.step_flops


FORMS = ("bfloat16", "float16", "int8", "int4", "nf4")


@pytest.mark.slow
@pytest.mark.parametrize("form", slow_except(FORMS, "int8", "bfloat16"))
def test_weights_of_every_form_are_scored_against_float32(form, trained, tmp_path):
    assert serve(trained, tmp_path / "run", form, infer__rules="(('patch/|final/', 'bfloat16'),)") == 0
    row = read_record(tmp_path / "run" / "record.json")
    quality, physical, whole = row["quality"], row["physical"], read_record(trained / "record.json")
    bytes_before = whole["physical"]["resident_weight_bytes"]
    assert physical["resident_weight_bytes"] < 0.6 * bytes_before
    likelihoods = [Flow().likelihood(loss) for loss in (quality["eval_loss"], whole["quality"]["eval_loss"])]
    rate = bytes_before / physical["resident_weight_bytes"] * likelihoods[0] / likelihoods[1]
    assert row["paper"]["mcr"] == pytest.approx(rate, rel=1e-4) and row["paper"]["mcr"] > 1.5


@pytest.mark.slow
def test_a_mesh_shares_the_pictures_of_a_batch(trained):
    """Rows over `data`, patches over `sequence`, kernels over `tensor`: the pictures are those of one device."""
    drawn = []
    for mesh in ("data=1", "data=2, sequence=2, tensor=2"):
        serving = described(trained, mesh=mesh, **{"infer.batch_size": 4})
        with jax.set_mesh(serving.mesh):
            params = serving.load("float32")
            drawn.append(image_samples.draw(serving.sampler, params, 4).astype(int))
    assert np.abs(drawn[0] - drawn[1]).max() <= 1 and drawn[0].std() > 10


@pytest.mark.slow
def test_random_weights_of_a_complete_size_need_no_data(tmp_path, capsys):
    """Times and bytes are real; there is nothing to score, and latents are no pictures."""
    values = MODEL | {"model.pretrained": "", "objective": "ddpm()", "data": "images(path='/nowhere', size=8)"}
    values |= {"model.embed": "patches(patch=2, side=8, channels=4, classes=10, learned_sigma=True)"}
    values |= {"infer.solver": "ddim(steps=2)", "infer.guidance_channels": 3}
    assert serve("", tmp_path / "run", "bfloat16", **values) == 0
    row, printed = read_record(tmp_path / "run" / "record.json"), capsys.readouterr().out
    assert row["outcome"] == "ok" and row["physical"]["images_per_s"] > 0
    assert row["quality"]["eval_loss"] is None and "random weights" in row["sources"]["eval_loss"]["reason"]
    assert row["paper"]["mcr"] is None and "random weights" in row["sources"]["mcr"]["reason"]
    assert "no pictures: latents of 4 channels" in printed
    assert "random, of size" in row["provenance"]["weights"]


@pytest.mark.slow
def test_latents_are_decoded_by_the_autoencoder(tmp_path):
    from PIL import Image

    folder = folders.save(tmp_path / "vae")
    values = MODEL | {"model.pretrained": "", "objective": "flow()", "autoencoder": f"kl(path='{folder}')"}
    values |= {"model.embed": "patches(patch=2, side=8, channels=4, classes=10)", "sample.images": 2}
    assert serve("", tmp_path / "run", **values) == 0
    row = read_record(tmp_path / "run" / "record.json")
    physical, image = row["physical"], np.asarray(Image.open(tmp_path / "run" / "samples" / "001.png"))
    assert image.shape == (16, 16, 3) and row["provenance"]["autoencoder"] == values["autoencoder"]
    assert 0 < physical["decode_s"] < physical["image_latency_s"]
    steps = physical["image_latency_s"] - physical["decode_s"]
    assert physical["step_s"] == pytest.approx(steps / 3)
    assert "the decoder's jaxpr" in row["sources"]["flops_per_image"]["source"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_between_steps_and_leaves_finished_pictures(number, trained, tmp_path, monkeypatch, capsys):
    steps = image_samples.DiffusionSampler.advance
    taken = []

    def advance(self, *arguments):
        taken.append(1)
        if len(taken) == 5:  # the second batch of two pictures
            os.kill(os.getpid(), number)
        return steps(self, *arguments)

    monkeypatch.setattr(image_samples.DiffusionSampler, "advance", advance)
    assert serve(trained, tmp_path / "run") == 128 + number
    assert sorted(file.name for file in (tmp_path / "run" / "samples").iterdir()) == ["000.png", "001.png", "grid.png"]
    printed = capsys.readouterr().out
    assert f"{signal.Signals(number).name}: what was generated is in" in printed and len(taken) <= 6


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"infer__prompts": "('a cat',)"}, "a diffusion model samples pictures of its classes"),
        ({"quality__tasks": "('study',)"}, "tasks of the lm-evaluation-harness are text"),
        ({"infer__solver": "ddim"}, "config.infer.solver = 'ddim'"),
        ({"infer__guidance_channels": 2}, "config.infer.guidance_channels = 2: the model predicts 1"),
        ({"quant": "int4(method='gptq')"}, "is calibrated on text"),
        ({"quant": "stored"}, "holds no weights quantized"),
        ({"infer__rules": "(('norm', 'int8'),)"}, "matches no kernel or table"),
        ({"data": "glyphs(size=32, channels=1)"}, "config.model.embed: side = 16: the pictures of config.data have 32"),
        ({"mesh": "data=4"}, "take a multiple of 4"),
        ({"objective": "next_token()", "infer__solver": ""}, "holds images, and text is needed"),
        ({"objective": "ddpm()"}, "learned_sigma"),
        ({"model__pretrained": ""}, "config.model.pretrained = '': config.objective = 'pretrained' needs the model"),
        ({"memory_gb": 1e-6}, "as float32, and states of 2 pictures of 16 x 16 x 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_input_is_one_line_and_status_2(overrides, message, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(PICTURES, "generate", lambda *_: pytest.fail("compiled"))
    with contextlib.suppress(FileNotFoundError):
        assert serve(trained, tmp_path / "run", **overrides) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error


PICTURES = setup.PictureServing


@pytest.mark.parametrize("key", ["infer.solver", "infer.guidance", "infer.guidance_channels"])
def test_a_language_model_has_no_solver(key, tmp_path, capsys):
    value = {"infer.solver": "euler"}.get(key, 2)
    values = {"model.pretrained": "", "model.size": SIZE, "infer.chat": False, "tokenizer": "bytes", key: value}
    assert main.main(argv("infer.py:float32", tmp_path / "run", values)) == 2
    error = capsys.readouterr().err
    assert f"config.{key} = " in error and "a language model" in error and error.count("\n") == 1


@pytest.mark.slow
def test_a_row_of_another_objective_is_no_baseline(trained, tmp_path, capsys):
    assert serve(trained, tmp_path / "a") == 0
    file = tmp_path / "a" / "record.json"
    assert serve(trained, tmp_path / "b", "int8", infer__baseline=file) == 0
    assert read_record(tmp_path / "b" / "record.json")["paper"]["mcr"] > 1.5
    record = json.loads(file.read_text())
    record["provenance"]["objective"] = "flow(shift=3.0)"
    file.write_text(json.dumps(record))
    capsys.readouterr()
    assert serve(trained, tmp_path / "c", "int8", infer__baseline=file) == 2
    assert "its objective is flow(shift=3.0), and here it is flow()" in capsys.readouterr().err


def test_parameters_have_one_shape_however_they_are_loaded(trained):
    serving = described(trained)
    loaded = serving.load("float32")
    expected = jax.tree.map(lambda leaf: leaf.shape, nn.unbox(model.abstract_params(serving.lm)))
    assert jax.tree.map(np.shape, loaded) == expected


@pytest.mark.slow
def test_samples_are_described_and_judged(trained, tmp_path, monkeypatch):
    train = own_features.train
    monkeypatch.setattr(own_features, "train", lambda *data: train(*data, steps=2))
    workdir = tmp_path / "run"
    assert serve(trained, workdir, sample__images=2, infer__batch_size=33, infer__repeats=1, quality__fd=66) == 0
    row = read_record(workdir / "record.json")
    assert all(row["quality"][key] is not None for key in sample_quality.KEYS)
    assert row["provenance"]["samples"]["count"] == 66 and "euler(steps=3)" in row["provenance"]["samples"]["how"]
    described = json.loads((workdir / "samples" / "samples.json").read_text())
    assert described["classes"] == ["a", "c"] and len(described["nearest"]["distances"]) == 2
    assert (workdir / "samples" / "nearest.png").is_file()


def test_too_few_samples_are_refused(trained, tmp_path, capsys):
    assert serve(trained, tmp_path / "run", quality__fd=64) == 2
    assert "config.quality.fd = 64: a distance of so few samples" in capsys.readouterr().err
