"""Plans of candidates beside those of the plan task."""

import pytest

from efficientllm.config.field_keys import name_keys
from efficientllm.plan import hardware, serving, training_step
from efficientllm.recommend.planned_serving import ServingPlanner
from efficientllm.recommend.planned_training import TrainingPlanner
from efficientllm.recommend.request import batch_changes, make_request
from efficientllm.recommend.techniques import complete, identity_of, list_techniques, preset_of
from efficientllm.report.query import Query

NO_LIMITS = Query(None, False, ())
SHAPE = "tiny(num_layers=6, dim=64, num_heads=2, num_kv_heads=1, head_dim=32, hidden=96)"
EXTRA = ("--config.train.batch_size=12", "--config.train.length=32", "--config.tokenizer=bytes")


def technique(task, name):
    return next(one for one in list_techniques(task, []) if one.name == name)


@pytest.mark.parametrize(
    ("name", "devices"), [("lora", 1), ("dora over int8", 1), ("lora over nf4", 2), ("full", 4), ("freeze", 1)]
)
def test_a_training_plan_is_that_of_the_plan_task(name, devices):
    request = make_request(
        "tune",
        "smollm2-135m",
        "rtx4090",
        devices,
        NO_LIMITS,
        (*EXTRA, f"--config.model.size={SHAPE}", "--config.model.pretrained="),
    )
    planner, one = TrainingPlanner(request), technique("tune", name)
    settings = planner.settings(one)
    assert len(settings) == 2 * (1 if devices == 1 else 2) * len(
        [n for n in (1, 2, 3, 4, 6, 12) if 12 // n % devices == 0]
    )
    for setting in settings:
        candidate = planner.plan(one, setting)
        config = request.config(one.config, candidate.all_changes)
        with name_keys(config):
            exact = training_step.describe(config, planner.devices, "gpu", request.hardware.capability)
        assert candidate.metrics["peak_memory_bytes"] == pytest.approx(exact.by_shapes(), rel=1e-6), setting
        assert candidate.metrics["params_trainable"] == exact.readings()["params_trainable"].value
        assert planner.least_memory(one) <= exact.by_shapes()
        assert planner.least_seconds(one) <= candidate.metrics["al_s"]


def test_rematerialization_costs_a_forward_pass_and_micro_batches_cost_none():
    extra = (*EXTRA, f"--config.model.size={SHAPE}", "--config.model.pretrained=")
    request = make_request("tune", "smollm2-135m", "rtx4090", 1, NO_LIMITS, extra)
    planner, one = TrainingPlanner(request), technique("tune", "full")
    plain, again, micro = (
        planner.plan(one, {"model.remat": remat, "train.accumulate": n}).metrics
        for remat, n in (("none", 1), ("full", 1), ("none", 12))
    )
    assert plain["peak_memory_bytes"] > again["peak_memory_bytes"]
    assert plain["peak_memory_bytes"] > micro["peak_memory_bytes"]
    assert plain["al_s"] <= again["al_s"] and plain["flops_per_token"] == again["flops_per_token"]


@pytest.mark.parametrize("form", ["bfloat16", "int8", "int4", "nf4"])
@pytest.mark.parametrize("devices", [1, 2])
def test_a_serving_plan_is_that_of_the_plan_task(form, devices):
    request = make_request("infer", "smollm2-135m", "rtx4090", devices, NO_LIMITS)
    planner, one = ServingPlanner(request), technique("infer", f"{form}, int8 KV cache")
    for setting in [setting for setting in planner.settings(one) if setting["infer.batch_size"] == 4]:
        candidate = planner.plan(one, setting)
        config = request.config(one.config, candidate.all_changes)
        with name_keys(config):
            exact = serving.describe(config, hardware.devices(request.hardware, devices), "gpu")
        assert candidate.metrics["peak_memory_bytes"] == exact.by_shapes()
        assert candidate.metrics["resident_weight_bytes"] == exact.weights
        decode = exact.phases()[2][1]
        assert candidate.metrics["tpot_s"] == pytest.approx(decode / request.hardware.bandwidth().value)


@pytest.mark.quick
def test_specs_are_one_technique_whatever_fields_they_spell_out():
    assert complete("quant", "nf4()") == complete("quant", "nf4(block=64)") != complete("quant", "nf4(block=32)")
    spelt = {"adapter": "lora(rank=64, alpha=128)", "quant": "nf4(block=64)"}
    assert identity_of("tune", spelt) == technique("tune", "lora over nf4").identity
    assert identity_of("infer", {"quant": "int4(method='rtn')"}) == technique("infer", "int4").identity


@pytest.mark.quick
def test_reports_without_configs_are_read_by_their_names():
    used = {"tuning": "lora-plus", "precision": "float32"}
    assert preset_of("tune", used, "lora_plus")["adapter"].startswith("lora_plus(")
    assert preset_of("tune", {"tuning": "lora", "precision": "nf4"}, "qlora")["quant"] == "nf4(block=64)"
    assert preset_of("tune", {"tuning": "ia3"}, "ia3") is None
    assert preset_of("infer", {"precision": "int4"}, "int4_gptq") == {"quant": "int4(method='gptq')"}
    assert preset_of("infer", {"precision": "int8"}, "int8") == {"quant": "int8"}
    names = {"attention": "gqa", "position": "rope", "ffn": "dense"}
    assert preset_of("pretrain", names | {"attention": "mamba", "position": "none"}, "m")["model.mixer"] == "mamba"
    assert preset_of("pretrain", names | {"position": "alibi"}, "alibi")["model.position"] == "alibi"
    assert preset_of("pretrain", names | {"attention": "new"}, "new") is None


@pytest.mark.quick
def test_a_batch_is_read_from_its_text():
    expected = {"train.batch_size": 4, "train.length": 128}
    assert batch_changes("tune", "4 x 128 tokens a step") == expected and batch_changes("tune", "16 pictures") == {}
    text = "batch_size 1, prompt_length 512, max_new_tokens 128, prompts ['a']"
    assert batch_changes("infer", text) == {
        "infer.batch_size": 1,
        "infer.prompt_length": 512,
        "infer.max_new_tokens": 128,
    }
