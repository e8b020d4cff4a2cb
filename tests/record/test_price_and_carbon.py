"""Cost and CO2 of the time and power of a run."""

import json

import pytest

import runs
from efficientllm import base_config, main
from efficientllm.config import schema
from efficientllm.metrics.reading import Reading, missing
from efficientllm.record import price_and_carbon
from efficientllm.record.row import format_table

CARBON = "400 g/kWh, a test"
STEPS = 16
NO_ENERGY = missing("W", "no energy counter")


def config(task="pretrain", price=3.6, carbon=CARBON):
    made = base_config.get_config()
    made.task, made.train.steps = task, 100
    made.metrics.price, made.metrics.carbon = price, carbon
    return schema.validate_config(made)


def row(power=None, devices=2, images=False, **kwargs):
    """Amounts of 1000 tokens/s in training, 500 in serving, of steps of 0.5 s."""
    power = power or Reading(360.0, "W", "nvml energy counter (measured, gpu)")
    paper = {"al_s": Reading(0.5, "s", "test"), "it_tokens_per_s": Reading(500.0, "1/s", "test"), "aec_w": power}
    physical = {"tokens_per_s": Reading(1000.0, "1/s", "test")}
    if images:
        physical["images_per_s"] = Reading(4.0, "1/s", "test")
    return price_and_carbon.of_row(config(**kwargs), paper, physical, devices)


def values(amounts):
    return {key: amount.value for key, amount in amounts.items()}


@pytest.mark.quick
def test_training_costs_its_device_hours_and_emits_its_energy():
    # 1000 s a million tokens on 2 devices at a thousandth of a dollar a second; 360 kJ are 0.1 kWh.
    expected = {"usd_per_mtoken": 2.0, "co2_g_per_mtoken": 40.0, "usd_per_run": 0.1, "co2_g_per_run": 2.0}
    amounts = row()
    assert values(amounts) == pytest.approx(expected) and amounts.keys() == price_and_carbon.UNITS.keys()
    assert {key: amount.unit for key, amount in amounts.items()} == price_and_carbon.UNITS
    assert "3.6 $ an hour" in amounts["usd_per_run"].source
    assert amounts["co2_g_per_run"].source.endswith("nvml energy counter (measured, gpu) x 400 g/kWh: a test")


@pytest.mark.quick
def test_generated_tokens_pay_for_their_prefill_and_a_server_has_no_run():
    amounts = row(task="infer")
    assert amounts["usd_per_mtoken"].value == pytest.approx(4.0)  # 500 tokens/s of whole requests, not 1000 of decoding
    assert amounts["usd_per_run"].value is None and "inference" in amounts["usd_per_run"].reason


@pytest.mark.quick
def test_pictures_have_amounts_of_their_own():
    trained, sampled = row(images=True), row(images=True, task="infer")
    for amounts in (trained, sampled):  # a quarter of a second on two devices
        assert amounts["usd_per_image"].value == pytest.approx(0.0005)
        assert amounts["co2_g_per_image"].value == pytest.approx(0.01)
    assert trained["usd_per_mtoken"].value == pytest.approx(2.0)
    assert sampled["usd_per_mtoken"].value is None and "image" in sampled["usd_per_mtoken"].reason


@pytest.mark.quick
def test_nulls_say_which_figure_is_missing():
    amounts = row(price=0, carbon="")
    assert set(values(amounts).values()) == {None}
    assert "config.metrics.price" in amounts["usd_per_run"].reason
    assert "config.metrics.carbon" in amounts["co2_g_per_run"].reason
    unmetered = row(power=NO_ENERGY)
    assert unmetered["co2_g_per_mtoken"].reason == "no energy counter" and unmetered["usd_per_mtoken"].value == 2.0


@pytest.mark.quick
def test_a_plan_costs_its_planned_time():
    planned, units = Reading(0.5, "s", "planned"), {"mtoken": 0.001, "run": 1 / 100}
    amounts = price_and_carbon.of_plan(config(), planned, NO_ENERGY, units, devices=8)
    assert amounts["usd_per_mtoken"].value == pytest.approx(0.5 / 0.001 * 8 / 1000)
    assert amounts["usd_per_run"].value == pytest.approx(50 * 8 / 1000)
    assert amounts["co2_g_per_run"].reason == "no energy counter"
    unknown = price_and_carbon.of_plan(config(), missing("s", "no peak"), NO_ENERGY, units, devices=8)
    assert unknown["usd_per_run"].reason == "no peak"


def test_rows_of_runs_and_plans_have_their_cost(tmp_path, capsys):
    texts = runs.corpus(tmp_path / "texts")
    priced = {"metrics.price": 7.2, "metrics.carbon": CARBON, "train.steps": STEPS}
    priced |= {"eval.every": 0, "checkpoint.every": STEPS}  # steps after which one waits are not measured
    assert main.main(runs.arguments(texts, tmp_path / "run", **priced)) == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    # Eight simulated devices are the cores of one machine.
    cost = record["paper"]["al_s"] * STEPS * 7.2 / 3600
    assert record["physical"]["usd_per_run"] == pytest.approx(cost)
    assert record["physical"]["co2_g_per_run"] is None
    assert record["sources"]["co2_g_per_run"]["reason"] == record["sources"]["aec_w"]["reason"]
    assert "cost all steps" in format_table(record)

    planned = runs.arguments(texts, tmp_path / "plan", **priced, task="plan", plan__hardware="h100", plan__devices=8)
    capsys.readouterr()
    assert main.main([*planned, "--config.mesh=data=8"]) == 0
    predicted = json.loads((tmp_path / "plan" / "record.json").read_text())["predicted"]
    assert predicted["usd_per_run"] == pytest.approx(predicted["al_s"] * STEPS * 8 * 7.2 / 3600)
    assert predicted["reasons"]["co2_g_per_run"] == predicted["reasons"]["aec_w"]
    assert "cost all steps" in capsys.readouterr().out
