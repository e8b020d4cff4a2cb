"""experiments/vision_language/plans.csv, plans of the study's models: numbers, and a row planned again."""

import pytest

import runs
from convert.hf_config.test_vision_language import PUBLISHED
from efficientllm.plan import hardware
from efficientllm.record.row import read_record
from efficientllm.registry.plugins import import_file

pytestmark = pytest.mark.quick
FOLDER = runs.ROOT / "experiments" / "vision_language"
plans = import_file(FOLDER / "plans.py")
LINES = plans.FILE.read()


def column(key, pattern):
    """`{plan: number}` of the rows whose name has `pattern`, which must be some."""
    chosen = {name: float(row[key]) for name, row in LINES.items() if pattern in name}
    assert chosen, pattern
    return chosen


def test_every_plan_has_its_row():
    assert list(LINES) == list(plans.list_plans())


# TFLOP of the tower and of prefill with a picture of 1000 x 1000 and 32 tokens beside it, and bytes of the KV cache a
# token in bfloat16: closed formulas of the published shapes.
@pytest.mark.parametrize(
    "model, tower, prefill, kv_bytes",
    [
        ("qwen2.5-vl-7b", 7.26, 17.69, 57_344),
        ("qvq-72b", 11.1, 189, 327_680),
        ("llava-1.5-7b", 0.39, 8.1 * 608 / 616, 524_288),
        ("internvl3-38b", 10 * 11.9, 217 * 2592 / 3360, 262_144),  # in ten tiles
    ],
)
def test_costs_are_those_of_the_published_shapes(model, tower, prefill, kv_bytes):
    assert set(column("parameters", f"{model}/").values()) == {PUBLISHED[model][1]}
    served = f"{model}/infer/bfloat16/"
    assert set(column("kv_bytes_per_token", served).values()) == {kv_bytes}
    for key, expected in (("images_tflop", tower), ("prefill_tflop", prefill)):
        planned = list(column(key, served).values())
        assert planned == pytest.approx([expected] * len(planned), rel=0.01)


def test_methods_are_planned_at_equal_work():
    for model in plans.MODELS:
        rows = [row for name, row in LINES.items() if name.startswith(f"{model}/tune/")]
        assert len(rows) == 7
        for key in ("batch", "length", "image_tokens", "patches", "mesh", "devices"):
            assert len({row[key] for row in rows}) == 1


def test_the_readme_has_the_tables_of_today():
    assert plans.FILE.format_tables(LINES) in (FOLDER / "README.md").read_text()


@pytest.mark.slow
def test_a_row_is_what_is_planned_today(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware.Hardware, "has_compiler", False)
    name = "llava-1.5-7b/tune/lora/h200_8"
    plans.planning.make(name, *plans.list_plans()[name], tmp_path)
    planned = plans.FILE.row(name, read_record(tmp_path / name / "record.json"))
    planned = {key: "" if value is None else str(value) for key, value in planned.items()}
    written = dict(LINES[name])
    for key in ("peak_gb", "activations_gb"):  # what the backward pass keeps is JAX's rule, by its version
        assert float(planned.pop(key)) == pytest.approx(float(written.pop(key)), rel=0.05)
    assert planned == written
