"""experiments/dit/plans.csv, the plans of the diffusion transformers of the study: numbers, and a row planned again."""

import pytest

import runs
from efficientllm.plan import hardware
from efficientllm.record.row import read_record
from efficientllm.registry.plugins import import_file

pytestmark = pytest.mark.quick
plans = import_file(runs.ROOT / "experiments" / "dit" / "plans.py")


def test_plans_have_the_papers_parameters_beside_the_studys_numbers():
    lines = plans.FILE.read()
    assert list(lines) == [name for name in plans.list_plans() if name in lines]
    assert {line["batch"] for line in lines.values()} == {"256", "288"}
    parameters = {name: int(line["parameters"]) for name, line in lines.items()}
    # DiT's paper; the study's MQA and GQA by 256 / AL / TT of its table
    assert parameters["dit_xl2/mha/h200"] == 674_834_720 and parameters["dit_b4/mha/gh200"] == 130_426_496
    assert parameters["dit_xl2/mqa/h200"] == pytest.approx(605.5e6, rel=1e-3)
    assert parameters["dit_xl2/gqa/h200"] == pytest.approx(619.3e6, rel=1e-3)
    assert {line["study_al_ms"] for name, line in lines.items() if name.startswith("dit_b4")} == {""}
    assert [lines[f"dit_xl2/{name}/h200"]["study_amu_gb"] for name in ("mha", "mla", "moba")] == ["40.5", "45.84", ""]


def test_a_row_is_what_is_planned_today(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware.Hardware, "has_compiler", False)
    name = "dit_b4/gqa/h200"
    plans.planning.make(name, *plans.list_plans()[name], tmp_path)
    planned = plans.FILE.row(name, read_record(tmp_path / name / "record.json"))
    planned = {key: "" if value is None else str(value) for key, value in planned.items()}
    written = plans.FILE.read()[name]
    for key in ("peak_gb", "by_shapes_gb"):  # which intermediates the backward pass keeps is JAX's rule, by its version
        assert float(planned.pop(key)) == pytest.approx(float(written.pop(key)), rel=0.05)
    assert planned == written
