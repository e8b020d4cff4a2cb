"""A run's folder and an adapter's folder as `config.model.pretrained`: the parameters are those the run ended with."""

import json
import shutil

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
import pytest

import runs
from convert import folders
from efficientllm import convert, main, model, sharding
from efficientllm.adapters.base import merge
from efficientllm.convert import run_folder
from efficientllm.errors import UserError
from tiers import slow_except

pytestmark = pytest.mark.xdist_group("run_folders")

SIZE = "tiny(num_layers=2, dim=16, num_heads=2, num_kv_heads=1, head_dim=8, hidden=24)"
SHORT = {"train.steps": 2, "checkpoint.every": 1, "train.log_every": 2, "eval.batches": 1}
SHORT |= {"sample.tokens": 0, "train.batch_size": 2, "train.length": 16}


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    where = tmp_path_factory.mktemp("runs")
    runs.corpus(where / "texts")
    folders.llama(where / "model", vocab_size=300)
    return where


@pytest.fixture(scope="module")
def trained(where):
    """`trained(name, **overrides)` -> (its folder, the parameters it ended with, plain, by path)."""
    from efficientllm.tasks.training import Training

    ended = {}

    def run(name, **overrides):
        workdir = where / name
        if name not in ended:
            with pytest.MonkeyPatch.context() as patch:
                finish, mesh = Training._finish, sharding.make_mesh
                patch.setattr(sharding, "make_mesh", lambda spec, _: mesh(spec, jax.devices()[:1]))  # compiles sooner
                patch.setattr(
                    Training,
                    "_finish",
                    lambda self, state: (ended.update({name: merge(state.all_params)}), finish(self, state))[1],
                )
                argv = runs.arguments(where / "texts", workdir, **{"model.size": SIZE} | SHORT | overrides)
                assert main.main(argv) == 0
        return workdir, flat(ended[name])

    return run


def flat(params):
    return {path: np.asarray(leaf) for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items()}


def loaded(folder, **changes):
    source = convert.open_source(folder)
    lm = source.lm(**changes)
    return flat(source.load(nn.unbox(model.abstract_params(lm)), lm=lm))


def assert_equal(actual, expected, tolerance=1e-6):
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_allclose(actual[path], array, atol=tolerance, rtol=tolerance, err_msg=path)


def tuned(where, **overrides):
    return {"task": "tune", "model.pretrained": where / "model"} | overrides


SCRATCH = {
    "plain": {},
    "words": {"tokenizer": "bpe(vocab_size=300)"},
    "hybrid": {
        "model.pattern": "('mamba | none', 'gqa | moe(num_experts=4, top_k=2, hidden=8)')",
        "model.tied": False,
        "model.size": SIZE.replace("num_layers=2", "num_layers=3"),
    },
    "widths": {
        "model.mixer": "mqa",
        "model.parameters_of": "mha | swiglu",
        "model.size": "tiny(num_layers=1, dim=64, num_heads=4, num_kv_heads=2, head_dim=16, hidden=192)",
    },
    "drawn": {"adapter": "lora(rank=2)"},
}
TUNED = {
    "full": {"adapter": "full()"},
    "freeze": {"adapter": "freeze(last=1)"},
    "lora": {"adapter": "lora(rank=2, alpha=4)"},
    "pissa": {"adapter": "pissa(rank=2)"},
    "dora": {"adapter": "dora(rank=2)"},
    "glora": {"adapter": "glora(rank=2)"},
    "lokr": {"adapter": "lokr(rank=2)"},
    "qlora": {"adapter": "lora(rank=2)", "quant": "int8()"},
}


@pytest.mark.parametrize("name", slow_except(SCRATCH, "plain"))
def test_a_run_from_scratch_is_what_it_ended_with(name, trained):
    folder, expected = trained(name, **SCRATCH[name])
    assert_equal(loaded(folder), expected)


@pytest.mark.parametrize("name", slow_except(TUNED, "lora"))
def test_a_tuned_run_is_what_it_ended_with(name, trained, where):
    folder, expected = trained(name, **tuned(where, **TUNED[name]))
    params = loaded(folder, scan=any(path.startswith("groups/") for path in expected))
    assert_equal(params, expected, 1e-5)
    assert not name.startswith("lora") or any(
        not np.allclose(params[path], array) for path, array in loaded(where / "model").items()
    )


def test_an_adapter_s_folder_is_its_base_with_the_adapter(trained, where, tmp_path):
    folder, expected = trained("lora", **tuned(where, **TUNED["lora"]))
    assert_equal(loaded(folder / "adapter"), expected, 1e-5)
    assert convert.open_source(folder / "adapter").config["model_type"] == "llama"
    moved = tmp_path / "moved"  # where the base was is written in it; where the run lies says so too
    shutil.copytree(folder, moved)
    config = json.loads((moved / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/nowhere/at/all"
    (moved / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert_equal(loaded(moved / "adapter"), expected, 1e-5)
    (moved / "config.json").unlink()
    with pytest.raises(UserError, match="its base model cannot be opened: .*/nowhere/at/all.*--merge="):
        convert.open_source(moved / "adapter")


@pytest.mark.slow
def test_runs_go_on_from_runs_and_are_converted(trained, where, tmp_path):
    """Tuning from a run that was trained from scratch, then from that; a run as a folder of transformers."""
    first, _ = trained("plain")
    second, after = trained("second", **tuned(where, adapter="lora(rank=2)") | {"model.pretrained": first})
    assert_equal(loaded(second), after, 1e-5)
    folder, expected = trained("lora", **tuned(where, **TUNED["lora"]))
    convert.convert(convert.open_source(folder), tmp_path / "out")
    assert_equal(loaded(tmp_path / "out"), expected, 1e-5)


def test_a_run_has_its_tokenizer_with_it(trained, where):
    from efficientllm import data

    folder, _ = trained("plain")
    assert convert.open_source(folder).tokenizer() == "bytes"
    tokenizer = data.build_tokenizer("bpe(vocab_size=300)", f"text(path='{where}/texts/*.txt')")
    tokenizer.save(where / "kept")
    again = data.build_tokenizer(f"hf(path='{where}/kept')", "python_docs()")
    assert (again.vocab_size, again.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    assert again.encode("the fox <|endoftext|>") == tokenizer.encode("the fox <|endoftext|>")
    assert np.array_equal(again.token_bytes, tokenizer.token_bytes)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: shutil.rmtree(folder / "checkpoints"), "checkpoints: no checkpoint; a run has one"),
        (lambda folder: edit(folder, task="infer"), "a run of 'infer' holds no model"),
        (lambda folder: edit(folder, adapter="lora(rank=x)"), "is not a spec"),
        (lambda folder: edit(folder, model={"size": 3}), "config.json is not that of a run"),
        (lambda folder: edit(folder, imports=["/nowhere.py"]), "cannot be imported"),
        (
            lambda folder: edit(folder, model={"pretrained": "/gone"}),
            "the run started from cannot be opened: .*/gone",
        ),
        (
            lambda folder: edit_model(folder, embed_norm=True),
            r"parameter 'embed_norm/scale' has shape none, the run's model asks for \[16\]; serve the run with",
        ),
        (
            lambda folder: edit(folder, adapter="lora(rank=2)"),
            r"parameter 'embedding' has shape \[\d+, \d+\], the run's model asks for none",
        ),
    ],
)
def test_what_is_no_run_is_one_line(change, message, trained, tmp_path):
    folder, _ = trained("plain")
    shutil.copytree(folder, tmp_path / "run")
    change(tmp_path / "run")
    with pytest.raises(UserError, match=message) as error:
        convert.open_source(tmp_path / "run")
    assert "\n" not in str(error.value)


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_model(folder, **changes):
    model = json.loads((folder / "config.json").read_text())["model"]
    edit(folder, model=model | changes)


def test_a_damaged_checkpoint_is_passed_over_and_nothing_is_changed(trained, tmp_path, capsys, caplog):
    folder, _ = trained("plain")
    shutil.copytree(folder, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "2"
    for file in sorted(newest.rglob("*")):
        if file.is_file() and file.stat().st_size > 50 and "state" in file.parts:
            file.write_bytes(b"\0" * 8)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert loaded(tmp_path / "run").keys() == loaded(folder).keys()
    assert "checkpoint 2 cannot be read" in capsys.readouterr().err + caplog.text
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == names


@pytest.mark.slow
def test_infer_takes_both(trained, where, tmp_path, capsys):
    folder, _ = trained("lora", **tuned(where, **TUNED["lora"]))
    completions = {}
    for name, source in (("run", folder), ("adapter", folder / "adapter")):
        flags = {"model.pretrained": source, "data": f"text(path='{where}/texts/*.txt')", "infer.chat": False}
        flags |= {"infer.max_new_tokens": 4, "infer.prompt_length": 4, "infer.repeats": 1, "train.length": 16}
        flags |= {"eval.batches": 1, "infer.prompts": "('Hi',)", "tokenizer": "bytes"}
        argv = [f"--config={runs.ROOT}/configs/infer.py:float32", f"--workdir={tmp_path / name}"]
        assert main.main([*argv, *(f"--config.{key}={value}" for key, value in flags.items())]) == 0
        completions[name] = (tmp_path / name / "samples" / "generated.jsonl").read_text()
    assert completions["run"] == completions["adapter"]
    jax.clear_caches()


def test_of_several_runs_the_newest_is_taken(trained, tmp_path):
    import os

    folder, _ = trained("plain")
    for name, age in (("old", 100), ("new", 0), ("older", 200), ("planned", -100)):
        shutil.copytree(folder, tmp_path / "runs" / name)
        stamp = (folder / "config.json").stat().st_mtime - age
        edit(tmp_path / "runs" / name, task="plan" if name == "planned" else "pretrain")
        os.utime(tmp_path / "runs" / name / "config.json", (stamp, stamp))
    assert convert.open_source(tmp_path / "runs").path == tmp_path / "runs" / "new"
    assert run_folder.newest_run(tmp_path / "runs" / "adapter") == tmp_path / "runs" / "new" / "adapter"
    assert run_folder.newest_run(folder) == folder and run_folder.newest_run(tmp_path / "none") == tmp_path / "none"


def test_a_run_from_scratch_becomes_a_folder_of_transformers(trained, tmp_path, capsys):
    from efficientllm.convert import __main__ as command

    folder, expected = trained("plain")
    assert command.main([str(folder), f"--out={tmp_path / 'out'}"]) == 0
    assert "-> " in capsys.readouterr().out
    assert_equal(loaded(tmp_path / "out"), expected, 1e-6)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 16
