"""Plans of pictures: the programs, FLOPs and bytes of a request, beside the run that it is of, without any data."""

import jax
import pytest

import runs
from autoencoders import folders
from configs import dit, dit_study, sd3
from efficientllm import main, registry
from efficientllm.cost import jaxpr_flops
from efficientllm.plan import hardware, training_step, workloads
from efficientllm.record.row import read_record

pytestmark = pytest.mark.quick
SIZE = "custom(num_layers=2, dim=32, num_heads=2, num_kv_heads=1, head_dim=16, hidden=64, rope_base=1e4, patch=2)"
CHANGES = {"model.size": SIZE, "model.embed": "patches(side=8, channels=4, classes=10, learned_sigma=True)"}
CHANGES |= {"plan.of": "infer", "infer.solver": "ddim(steps=5)", "infer.batch_size": 2, "quant": "bfloat16"}


def described(variant="mha", devices=1, **changes):
    config = dit_study.get_config(variant)
    config.update_from_flattened_dict(CHANGES | changes)
    planned, cpu = registry.lookup("planned", "infer"), hardware.find("cpu", 1)
    return planned.describe(planned.whole(config, None), jax.devices()[:devices], cpu.platform, cpu.capability)


def plan(workdir, variant="mha", **overrides):
    """`(exit status, row)` of a command line."""
    values = CHANGES | {"task": "plan"} | {key.replace("__", "."): value for key, value in overrides.items()}
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    status = main.main([f"--config={runs.ROOT}/configs/dit_study.py:{variant}", f"--workdir={workdir}", *flags])
    file = workdir / "record.json"
    return status, read_record(file) if file.exists() else None


@pytest.mark.parametrize("quant", ["bfloat16", "int8()"])
def test_a_request_is_as_many_steps_as_the_solver_has(quant):
    request = described(quant=quant)
    (step,) = request.programs()
    assert (step.name, step.times) == ("step", 5)
    assert step.model_flops == 2 * request.costs.step_flops == workloads.program_flops(request, step)
    single = described(quant=quant, **{"infer.guidance": 1.0, "infer.guidance_channels": 0})
    assert request.costs.step_flops == 2 * single.costs.step_flops


@pytest.mark.slow
def test_a_plan_is_of_the_run_that_is_measured(tmp_path, capsys):
    """Random weights of a model that says all of its pictures: neither needs data."""
    assert plan(tmp_path / "run", task="infer", infer__repeats=2, infer__baseline="")[0] == 0
    measured = read_record(tmp_path / "run" / "record.json")
    capsys.readouterr()
    status, row = plan(tmp_path / "plan", plan__calibration=tmp_path / "run")
    predicted, text = row["predicted"], capsys.readouterr().out
    assert status == 0 and predicted["fits"] and predicted["source"] == "compiler"
    for key in ("flops_per_image", "flops_per_token", "resident_weight_bytes", "params_total", "params_active"):
        assert row["physical"][key] == measured["physical"][key], key
    assert row["physical"]["program_flops_per_token"] == row["physical"]["flops_per_token"]
    assert predicted["by_shapes_bytes"] == measured["physical"]["predicted_memory_bytes"]
    assert predicted["image_latency_s"] == pytest.approx(5 * predicted["parts"]["step"]["step_s"])
    assert predicted["al_s"] == pytest.approx(measured["paper"]["al_s"])  # the one row that it is calibrated with
    assert predicted["it_tokens_per_s"] == pytest.approx(measured["paper"]["it_tokens_per_s"])
    assert "2 pictures of 8 x 8 x 4 in 5 steps, guided" in text and "5 x step" in text and "a picture" in text


@pytest.mark.slow
def test_decoding_is_planned_once_for_latents(tmp_path):
    folder = folders.save(tmp_path / "vae")
    request = described(autoencoder=f"kl(path='{folder}')")
    step, decode = request.programs()
    assert (step.times, decode.times) == (5, 1)
    products = jaxpr_flops.count_program_flops(decode.trace.jaxpr)
    assert decode.model_flops == pytest.approx(products) and products > 0
    assert request.costs.image_flops == 5 * request.costs.step_flops + request.costs.decode_flops
    assert (decode.precision, decode.shards, step.shards) == ("float32", 1, None)
    both = described(devices=2, mesh="data=1, tensor=2", autoencoder=f"kl(path='{folder}')")
    assert both.programs()[1].shards == 1  # each of them decodes both pictures
    assert described(devices=2, mesh="data=2", autoencoder=f"kl(path='{folder}')").programs()[1].shards == 2
    status, row = plan(tmp_path / "plan", autoencoder=f"kl(path='{folder}')")
    assert status == 0 and {key: program["times"] for key, program in row["predicted"]["parts"].items()} == {
        "step": 5,
        "decode": 1,
    }


@pytest.mark.slow
def test_memory_is_told_by_part(tmp_path):
    """Weights and the autoencoder's are there together, unless they are offloaded; a step and decoding never are."""
    folder = folders.save(tmp_path / "vae")
    spec = {"autoencoder": f"kl(path='{folder}', tile=0)"}
    request, parts = described(**spec), described(**spec).memory_parts
    stored = sum(tensor.nbytes for tensor in folders.tensors().values())
    assert parts["autoencoder"] == stored and parts["weights"] == request.weights
    assert parts["step"] == request.costs.live_bytes(2) and parts["decoding"] > 4 * 2 * 16 * 16 * 3
    assert request.by_shapes() == parts["weights"] + stored + max(parts["step"], parts["decoding"])
    offloaded = described(**spec, **{"infer.offload": True})
    assert offloaded.memory_parts == parts
    assert offloaded.by_shapes() == max(parts["weights"] + parts["step"], stored + parts["decoding"])
    assert described().memory_parts.keys() == {"weights", "step"}  # a model that needs no autoencoder to be sampled


@pytest.mark.parametrize("adapter", ["full", "lora(rank=2)"])
def test_memory_of_a_training_step_is_told_by_part(adapter):
    config = sd3.get_config("tiny")
    config.update_from_flattened_dict({"train.batch_size": 2, "mesh": "data=1", "adapter": adapter})
    step = training_step.describe(config, jax.devices()[:1], "cpu")
    parts, trainable = step.memory_parts, 4 * sum(leaf.size for leaf in jax.tree.leaves(step.shaped.params))
    assert parts["gradients"] == trainable and parts["weights"] == step.readings()["resident_weight_bytes"].value
    assert 0 < parts["optimizer"] - 2 * trainable < 100  # AdamW's two moments, its counts, the step and the key
    assert step.by_shapes() == sum(parts.values()) and parts["activations"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("of, variant", [("pretrain", "mha"), ("infer", "mha"), ("infer", "moe")])
def test_the_study_s_models_are_planned_for_hardware_that_is_not_here(of, variant, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware.Hardware, "has_compiler", False)
    values = {"plan.hardware": "h200", "plan.devices": 8, "plan.of": of, "train.batch_size": 96}
    values |= {"infer.batch_size": 96, "model.size": "dit_s2", "quant": "float32"}
    status, row = plan(tmp_path / "plan", variant, **values)
    predicted = row["predicted"]
    assert status == 0 and predicted["source"] == "shapes" and predicted["devices"] == 8
    assert row["physical"]["flops_per_image"] > 0 and predicted["al_s"] > 0
    sent = predicted["collectives"]
    assert sent == {} if of == "infer" else sent["all-reduce"]["bytes"] >= 4 * row["physical"]["params_total"]


def test_a_network_that_no_formula_gives_is_said_to_be_unknown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hardware.Hardware, "has_compiler", False)
    values = {"plan.hardware": "h200", "plan.devices": 8, "plan.of": "pretrain", "quant": "float32"}
    predicted = plan(tmp_path / "plan", "nsa", **values, train__batch_size=8)[1]["predicted"]
    assert predicted["collectives"] is None and "without the network" in predicted["reasons"]["collectives"]
    assert "network" not in predicted["roofline_s"] and "network not known: bound by" in capsys.readouterr().out


@pytest.mark.slow
def test_the_study_counts_pictures_where_it_counts_tokens_of_text(tmp_path):
    row = plan(tmp_path / "plan", **{"plan.of": "pretrain", "quant": "float32", "train.batch_size": 4})[1]
    predicted = row["predicted"]
    rate = 4 / predicted["al_s"] / row["physical"]["params_active"]
    assert predicted["tt_tokens_per_param_s"] == pytest.approx(rate)
    assert row["physical"]["flops_per_image"] == pytest.approx(16 * row["physical"]["flops_per_token"])


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"infer__prompts": "('a cat',)"}, "a diffusion model samples pictures of its classes"),
        ({"infer__solver": "euler"}, "config.infer.solver"),
        ({"infer__guidance_channels": 5}, "the model predicts 4"),
        ({"infer__batch_size": 3, "mesh": "data=2", "plan__devices": 2}, "take a multiple of 2"),
    ],
)
def test_bad_input_is_one_line_and_status_2(overrides, message, tmp_path, capsys):
    assert plan(tmp_path / "plan", **overrides) == (2, None)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error


@pytest.mark.parametrize("adapter", ["full", "freeze(last=1)"])
def test_flops_of_a_training_step_are_those_of_its_program(adapter):
    """Patches and noise levels have no gradient, nor has a conditioning vector that nothing trainable makes."""
    config = dit.get_config()
    size = "custom(num_layers=3, dim=32, num_heads=2, num_kv_heads=1, head_dim=16, hidden=48, rope_base=1e4, patch=4)"
    changes = {"model.size": size, "model.embed": "patches(side=16, channels=4, classes=7)", "train.batch_size": 4}
    config.update_from_flattened_dict(changes | {"model.parameters_of": "", "mesh": "data=1", "adapter": adapter})
    config.model.attention_kernel = "xla"  # the native one multiplies scores twice
    step = training_step.describe(config, jax.devices()[:1], "cpu")
    (program,) = step.programs()
    assert workloads.program_flops(step, program) == program.model_flops


@pytest.mark.parametrize("adapter", ["full", "freeze(last=2)"])
def test_flops_of_a_training_step_of_two_streams_are_those_of_its_program(adapter):
    """Stacks of dual and of plain layers, and a last one in which the text has no queries."""
    config = sd3.get_config("tiny")
    config.update_from_flattened_dict({"train.batch_size": 4, "mesh": "data=1", "adapter": adapter})
    config.model.attention_kernel = "xla"
    step = training_step.describe(config, jax.devices()[:1], "cpu")
    (program,) = step.programs()
    assert workloads.program_flops(step, program) == program.model_flops
