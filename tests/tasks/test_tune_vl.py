"""Tuning of vision-language models: a new tower for a language model, then adapters, then pictures in prompts."""

import json
import re

import pytest

import runs
from convert import folders
from efficientllm import main
from vision.records import write_records

pytestmark = pytest.mark.xdist_group("vision")
TOWER = "vit(num_layers=2, dim=32, num_heads=2, hidden=48, projector_hidden=48, patch=14, merge=2)"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random Llama for bytes, and records with pictures."""
    where = tmp_path_factory.mktemp("tune_vl")
    folders.llama(where / "model", vocab_size=300)
    (where / "data").mkdir()
    return where, write_records(where / "data")


def arguments(base, workdir, name, **overrides):
    where, data = base
    values = {
        "model.pretrained": where / "model",
        "model.embed": f'vision(tower="{TOWER}", image_token=290)',
        "tokenizer": "bytes",
        "data": data,
        "train.steps": 4,
        "train.batch_size": 8,
        "train.length": 96,
        "train.log_every": 1,
        "train.schedule": "constant(peak=0.01)",
        "eval.every": 2,
        "eval.batches": 2,
        "checkpoint.every": 2,
    } | {key.replace("__", "."): value for key, value in overrides.items()}
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    return [f"--config={runs.ROOT}/configs/tune_vl.py:{name}", f"--workdir={workdir}", *flags]


@pytest.fixture(scope="module")
def with_tower(base, tmp_path_factory):
    """The folder of a run that trained a new tower."""
    workdir = tmp_path_factory.mktemp("with_tower") / "run"
    assert main.main(arguments(base, workdir, "vision")) == 0
    return workdir


def test_what_learns_is_told_by_part(with_tower):
    """The tower and its projector learn, all of both and nothing else."""
    physical = json.loads((with_tower / "record.json").read_text())["physical"]
    lines = (with_tower / "log.txt").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:2] == ["part", "parameters"])
    rows = {}
    for line in lines[start + 1 : start + 4]:
        *words, total, trained = line.split()
        rows[" ".join(words)] = (int(total.replace(",", "")), int(trained.replace(",", "")))
    assert rows.keys() == {"language model", "tower", "projector"}
    assert rows["language model"][1] == 0 and all(rows[name][0] == rows[name][1] > 0 for name in ("tower", "projector"))
    assert sum(total for total, _ in rows.values()) == physical["params_total"]
    assert sum(trained for _, trained in rows.values()) == physical["params_trainable"]


def test_a_language_model_is_given_a_tower(with_tower):
    record = json.loads((with_tower / "record.json").read_text())
    data, physical = record["provenance"]["data"], record["physical"]
    assert data["train_pictures"] > 0 and data["held_out_pictures"] > 0 and data["row_slots"] % 4 == 0
    assert 0 < data["token_fill"] <= 1 and 0 < data["slot_fill"] <= 1
    assert re.search(
        r"data: \d+% of [\d,]+ tokens of a row and \d+% of [\d,]+ slots", (with_tower / "log.txt").read_text()
    )
    assert 0 < physical["params_trainable"] < physical["params_total"]
    assert record["quality"]["eval_loss"] > 0 and physical["flops_per_token"] > 0


@pytest.mark.slow
def test_an_interrupted_run_ends_as_if_it_had_not_been(base, with_tower, tmp_path):
    assert main.main(arguments(base, tmp_path / "run", "vision", train__steps=2)) == 0
    assert main.main(arguments(base, tmp_path / "run", "vision")) == 0
    whole, resumed = (json.loads((run / "record.json").read_text()) for run in (with_tower, tmp_path / "run"))
    assert whole["quality"]["eval_loss"] == resumed["quality"]["eval_loss"]
    assert runs.losses(with_tower) == runs.losses(tmp_path / "run")


@pytest.mark.slow
def test_its_run_is_tuned_by_an_adapter_of_the_language_model_and_served(base, with_tower, tmp_path, capsys):
    assert main.main(arguments(base, tmp_path / "run", "lora", model__pretrained=with_tower)) == 0
    adapter = json.loads((tmp_path / "run/record.json").read_text())
    total, trainable = (adapter["physical"][key] for key in ("params_total", "params_trainable"))
    dim, layers, rank = 64, 2, 16
    assert trainable < total and trainable % (rank * layers) == 0 and trainable > rank * layers * dim
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "Number 1?", "image": str(base[0] / "data/1_0.png")}))
    flags = {
        "model.pretrained": tmp_path / "run",
        "tokenizer": "bytes",
        "data": base[1],
        "train.length": 96,
        "train.batch_size": 8,
        "eval.batches": 1,
        "infer.chat": False,
        "infer.prompts": (str(tmp_path / "prompts.jsonl"),),
        "infer.max_new_tokens": 2,
        "infer.prompt_length": 8,
        "infer.repeats": 1,
    }
    flags = [f"--config.{key}={value}" for key, value in flags.items()]
    serve = [f"--config={runs.ROOT}/configs/infer_vl.py:float32", f"--workdir={tmp_path / 'served'}", *flags]
    assert main.main(serve) == 0
    served = json.loads((tmp_path / "served/record.json").read_text())
    assert served["provenance"]["images"] == 1 and served["quality"]["eval_loss"] > 0


def test_a_random_tower_that_would_stay_so_is_refused(base, tmp_path, capsys):
    for name in ("lora", "projector"):
        assert main.main(arguments(base, tmp_path / "run", name)) == 2
        error = capsys.readouterr().err.strip()
        assert "has no vision tower, and a random one would stay so" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"adapter": "freeze(train='nothing')"}, "train = 'nothing' matches no parameter"),
        ({"adapter": "freeze(train='(')"}, "train"),
        ({"adapter": "freeze(train='vision', last=1)"}, "set one of them"),
        ({"train.length": 2}, "config.train.length = 2: no train example of "),
    ],
)
def test_bad_input_is_one_line(base, tmp_path, capsys, overrides, message):
    assert main.main(arguments(base, tmp_path / "run", "vision", **overrides)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
