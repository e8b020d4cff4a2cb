"""Published models by their config.json alone: the parameters that their checkpoints hold, and nothing to load."""

import jax
import pytest

import runs
from efficientllm import convert, model
from efficientllm.errors import UserError
from efficientllm.sweep.__main__ import main
from tiers import slow_except

MODELS = runs.ROOT / "experiments" / "tuning" / "models"
# To the unit, as the headers of the published safetensors files have them.
PUBLISHED = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "mistral-7b": 7_248_023_552,
    "mistral-small-24b": 23_572_403_200,
}


@pytest.mark.parametrize("name", slow_except(PUBLISHED, "llama-3.2-1b", "mistral-small-24b"))
def test_it_has_the_parameters_of_the_published_checkpoint(name):
    source = convert.open_source(MODELS / name, weights=False)
    assert sum(leaf.size for leaf in jax.tree.leaves(model.abstract_params(source.lm()))) == PUBLISHED[name]


def test_all_are_here():
    assert sorted(path.name for path in MODELS.iterdir()) == sorted(PUBLISHED)


def test_what_has_no_weights_is_only_described():
    with pytest.raises(UserError, match="no \\*.safetensors in it"):
        convert.open_source(MODELS / "llama-3.2-1b")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen2.5-7b"])  # the others differ in sizes alone
def test_the_study_s_sweep_describes_every_run(name, capsys, monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    monkeypatch.syspath_prepend(str(runs.ROOT))
    flags = [f"--config.model.pretrained=experiments/tuning/models/{name}", "--dry_run"]
    assert main(["--config=experiments/tuning/study.py", *flags]) == 0
    output = capsys.readouterr().out
    assert f"{PUBLISHED[name]:,}" in output and "does not fit" in output and "3 values of train.rates" in output
