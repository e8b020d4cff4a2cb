"""The board's sweeps of tuning and of inference: every run of theirs is a command line that is accepted."""

import pytest

import runs
from efficientllm import main
from efficientllm.errors import UserError
from efficientllm.sweep import grid, spec

pytestmark = pytest.mark.quick
BOARD = runs.ROOT / "experiments/board"
TUNED = ("doc_pairs", "sums", "ranks-doc_pairs", "ranks-sums")


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(runs.ROOT)


def configs(listed):
    """`{variant: config}` of the first run of each variant."""
    return {run.variant: main.parse(list(run.argv))[0] for run in reversed(list(listed))}


@pytest.mark.parametrize("name", ["topics", "sources", "answers"])
def test_forms_are_scored_on_one_text(name):
    sweep = spec.load_sweep(f"{BOARD}/infer.py:{name}")
    by_variant = configs(spec.list_runs(sweep))
    forms = {config.quant for config in by_variant.values()}
    assert len(forms) == len(by_variant) == 16 and by_variant["float32"].quant == "float32"
    (data,) = {config.data for config in by_variant.values()}
    assert "held_out=0.8" in data and all(config.task == "infer" for config in by_variant.values())


def test_pictures_are_the_variants_of_the_study_with_costs_of_their_own():
    quality, costs = (spec.load_sweep(f"{BOARD}/{name}") for name in ("pictures.py", "costs.py:pictures"))
    assert list(quality.variants) == list(costs.variants) and quality.baseline == costs.baseline == "mha"
    assert (quality.measures, costs.measures) == ("quality", "cost")
    long, short = (configs(spec.list_runs(sweep)) for sweep in (quality, costs))
    for name, config in long.items():
        assert config.objective == short[name].objective and config.model.mixer == short[name].model.mixer
        assert (config.train.steps, short[name].train.steps) == (300, 40)


def test_a_ladder_needs_its_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such run; run the sweep experiments/board/pretrain.py:mixers-nano first"):
        spec.load_sweep(f"{BOARD}/infer.py:ladder-nano")
    run = tmp_path / "runs/board/mixers-nano/00-00-gqa-0123"
    run.mkdir(parents=True)
    (run / "record.json").write_text("{}")
    sweep = spec.load_sweep(f"{BOARD}/infer.py:ladder-nano")
    assert sweep.name == "board_infer_ladder_nano"
    assert sweep.overrides["model.pretrained"] == "runs/board/mixers-nano/00-00-gqa-0123"


@pytest.mark.parametrize("name", TUNED)
def test_methods_are_tuned_at_rates_around_their_own(name):
    sweep = spec.load_sweep(f"{BOARD}/tune.py:{name}")
    tries = list(grid.list_tries(sweep))
    assert len(tries) == 3 * len(sweep.variants)
    assert {main.parse(list(run.argv))[0].train.rates[0][1] for run in tries} == {0.25, 1.0, 4.0}
    by_variant = configs(spec.list_runs(sweep))
    shared = {
        (config.data, config.train.batch_size, config.train.length, config.eval.also) for config in by_variant.values()
    }
    assert len(shared) == 1
    if name.startswith("ranks"):
        ranks = {config.adapter for config in by_variant.values()}
        assert len(ranks) == 8 and {adapter.partition("(")[0] for adapter in ranks} == {"lora", "rslora"}
    else:
        assert len(by_variant) == 12 and by_variant["qlora"].quant == "nf4(block=64)"
        steps = {variant: config.train.steps for variant, config in by_variant.items()}
        assert steps.pop("untuned") == 1 and len(set(steps.values())) == 1
