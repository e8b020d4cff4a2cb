"""experiments/generators/plans.csv, plans of the study's image and video models: numbers, and a row planned again."""

import re

import pytest

import runs
from efficientllm.plan import hardware
from efficientllm.record.row import read_record
from efficientllm.registry.plugins import import_file

pytestmark = pytest.mark.quick
plans = import_file(runs.ROOT / "experiments" / "generators" / "plans.py")
LINES = plans.FILE.read()


def numbers(column, pattern):
    """The column in the rows whose name has `pattern`, which must be some."""
    chosen = [float(line[column]) for name, line in LINES.items() if re.search(pattern, name)]
    assert chosen, pattern
    return chosen


def test_every_plan_has_its_row_and_every_method_of_the_study_its_plan():
    assert list(LINES) == list(plans.list_plans())
    for size in plans.MODELS:
        methods = {name.split("/")[2] for name in LINES if name.startswith(f"{size}/tune/") and "/h200_8" in name}
        assert methods == {"lora", "loha", "lokr", "glora", "full"}
        served = {tuple(name.split("/")[2:]) for name in LINES if name.startswith(f"{size}/infer/") and "h200" in name}
        assert served == {(form, on) for form in ("bfloat16", "int8", "int4") for on in ("h200_1", "h200_4_tensor")}


@pytest.mark.parametrize(
    "size, parameters, forward, decode, tokens, weights, encoder",
    [
        # Products by the published shapes; bfloat16 weights are two bytes a parameter.
        ("sd35_medium", 2_243_171_520, 11.25, 10.47, 4096, 4.49, 9.52),
        ("wan_1.3b", 1_418_996_800, 283.0, 275.0, 32_760, 2.84, 11.36),
    ],
)
def test_costs_are_those_of_the_published_shapes(size, parameters, forward, decode, tokens, weights, encoder):
    assert set(numbers("parameters", f"^{size}/")) == {parameters}
    assert set(numbers("tokens", f"^{size}/")) == {tokens}
    for column, expected in (("forward_tflop", forward), ("decode_tflop", decode)):
        planned = numbers(column, f"^{size}/infer/(?!.*tiles)")  # tiles have halos, which are computed twice
        assert planned == pytest.approx([expected] * len(planned), rel=0.01)
    four, one = (numbers("least_ms", f"^{size}/infer/bfloat16/h200_{count}")[0] for count in ("4_tensor", "1$"))
    decoding = decode / 494 * 1e3  # ms: float32 in TF32 on every device
    assert four == pytest.approx((one - decoding) / 4 + decoding, rel=0.01)
    assert numbers("weights_gb", f"^{size}/infer/bfloat16/h200_1$") == pytest.approx([weights], rel=0.01)
    assert numbers("text_encoder_gb", f"^{size}/infer/bfloat16/h200_1$") == pytest.approx([encoder], rel=0.01)


def test_the_readme_has_the_tables_of_today():
    assert plans.FILE.format_tables(LINES) in (runs.ROOT / "experiments" / "generators" / "README.md").read_text()


def test_parts_of_memory_make_the_peak():
    for name, line in LINES.items():
        parts = {key: float(line[f"{key}_gb"] or 0) for key in ("weights", "optimizer", "gradients", "activations")}
        autoencoder, decoding, peak = (float(line[key] or 0) for key in ("autoencoder_gb", "decoding_gb", "peak_gb"))
        if line["offload"] == "yes":
            expected = max(parts["weights"] + parts["activations"], autoencoder + decoding)
        else:
            expected = sum(parts.values()) + autoencoder + max(0, decoding - parts["activations"])
        assert peak == pytest.approx(expected, rel=1e-3), name


def test_a_clip_fits_where_its_activations_are_not_kept_or_divided():
    """32,760 tokens need more than an H200 has where all are kept."""
    lines = {name.removeprefix("wan_1.3b/tune/"): line for name, line in LINES.items() if "wan_1.3b/tune/" in name}
    fits = {name: line["fits"] for name, line in lines.items()}
    assert fits["lora/h200_8"] == fits["lora/rtx4090_1"] == fits["full/rtx4090_1_remat"] == "no"
    assert fits["lora/h200_8_remat"] == fits["lora/h200_8_sequence2"] == fits["lora/rtx4090_1_remat"] == "yes"
    assert (lines["lora/rtx4090_1"]["fits_80"], lines["full/rtx4090_1_remat"]["fits_80"]) == ("no", "yes")
    kept, divided = (float(lines[f"lora/h200_8{ending}"]["activations_gb"]) for ending in ("", "_sequence8"))
    assert kept / 8 < divided < kept / 6  # chunks of the scores are recomputed, with sums of their own


@pytest.mark.slow
def test_a_row_is_what_is_planned_today(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware.Hardware, "has_compiler", False)
    name = "wan_1.3b/tune/lora/h200_8_remat"
    plans.planning.make(name, *plans.list_plans()[name], tmp_path)
    planned = plans.FILE.row(name, read_record(tmp_path / name / "record.json"))
    planned = {key: "" if value is None else str(value) for key, value in planned.items()}
    written = dict(LINES[name])
    for key in (
        "peak_gb",
        "activations_gb",
    ):  # which intermediates the backward pass keeps is JAX's rule, by its version
        assert float(planned.pop(key)) == pytest.approx(float(written.pop(key)), rel=0.05)
    assert planned == written
