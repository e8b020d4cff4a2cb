"""Tuning runs: from a checkpoint of others to a row and an adapter, stopped and resumed, and what is refused."""

import json
import logging
import signal

import flax.linen as nn
import jax
import numpy as np
import pytest

import runs
from convert import folders
from efficientllm import main
from efficientllm.convert import peft as adapters
from efficientllm.quant.apply import UNROUNDED, quantize
from efficientllm.quant.nf4 import NF4
from efficientllm.sweep import __main__ as sweep
from efficientllm.train import setup

pytestmark = pytest.mark.xdist_group("runs")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random Llama and records to tune it on."""
    where = tmp_path_factory.mktemp("tuning")
    folders.llama(where / "model", vocab_size=300)
    records = [
        {"prompt": f"What is {i} + {i}?", "response": f"It is {2 * i}. " * (1 + 5 * (i % 10 == 0))} for i in range(80)
    ]
    (where / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    return where


def arguments(base, workdir, method="lora(rank=4, alpha=8, dropout=0.1)", **overrides):
    values = {
        "model.pretrained": base / "model",
        "adapter": method,
        "data": f"pairs(path='{base}/records.jsonl', held_out=0.2)",
        "tokenizer": "bytes",
        "train.steps": 12,
        "train.batch_size": 8,
        "train.length": 48,
        "train.log_every": 1,
        "train.schedule": "constant(peak=0.01)",
        "eval.every": 0,
        "eval.batches": 1,
        "checkpoint.every": 4,
        "sample.prompt": "What is 3 + 3?",
        "sample.tokens": 4,
    } | {key.replace("__", "."): value for key, value in overrides.items()}
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    return [f"--config={runs.ROOT}/configs/tune.py", f"--workdir={workdir}", *flags]


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert main.main(arguments(base, workdir)) == 0
    return workdir


def test_a_row_counts_samples_and_what_learns(whole):
    row = json.loads((whole / "record.json").read_text())
    assert (row["outcome"], row["task"]) == ("ok", "tune")
    # 7 kernels a layer: q, o: 16 + 16; k, v: 16 + 8; gate, up, down: 16 + 24; times the rank and 2 layers.
    assert row["physical"]["params_trainable"] == 2 * 4 * (2 * 32 + 2 * 24 + 3 * 40)
    assert row["sources"]["tt_tokens_per_param_s"]["reason"]
    # One answer in ten is longer than a row.
    data = row["provenance"]["data"]
    assert data["train_cut"] + data["held_out_cut"] == 8
    assert (
        f"{data['train_cut']} of {data['train_documents']} records are longer than 48"
        in (whole / "log.txt").read_text()
    )
    learnt = row["physical"]["params_trainable"]
    files = [file for file in (whole / "checkpoints" / "12").rglob("*") if file.is_file()]
    assert row["physical"]["checkpoint_bytes"] == sum(file.stat().st_size for file in files) > 3 * 4 * learnt
    assert row["physical"]["mbu_copy"] is None and "too short" in row["sources"]["mbu_copy"]["reason"]
    losses = runs.losses(whole)
    assert len(losses) == 12 and losses[12] < losses[1]


def test_other_text_is_evaluated_with_what_was_tuned(base, tmp_path):
    """At a rate of zero it has the loss of the model itself: that of its own data again, and another of other text."""
    data = f"pairs(path='{base}/records.jsonl', held_out=0.2)"
    texts = f"text(path='{runs.corpus(tmp_path / 'texts')}/*.txt')"
    still = {"train__schedule": "constant(peak=0.0)", "train__steps": 2, "sample__tokens": 0}
    losses = []
    for name, changes in (("same", {"eval__also": data} | still), ("text", {"eval__also": texts} | still)):
        assert main.main(arguments(base, tmp_path / name, **changes)) == 0
        row = json.loads((tmp_path / name / "record.json").read_text())
        losses.append(row["quality"]["eval_loss_also"])
        assert row["sources"]["eval_loss_also"]["source"] == f"held-out text of {changes['eval__also']}"
        assert row["config"]["eval"]["also"] == changes["eval__also"]
    assert losses[0] == row["quality"]["eval_loss"] != losses[1]
    assert main.main(arguments(base, tmp_path / "tuned", eval__also=texts, train__steps=4, sample__tokens=0)) == 0
    row = json.loads((tmp_path / "tuned" / "record.json").read_text())
    assert abs(row["quality"]["eval_loss_also"] - losses[1]) > 1e-3


@pytest.mark.slow
def test_a_run_of_few_steps_is_measured_and_need_not_end_in_a_sample(base, tmp_path):
    argv = arguments(base, tmp_path / "run", train__steps=4, checkpoint__every=4, sample__tokens=0)
    assert main.main(argv) == 0
    row = json.loads((tmp_path / "run" / "record.json").read_text())
    assert row["paper"]["al_s"] > 0 and row["physical"]["tokens_per_s"] > 0
    assert "sample: " not in (tmp_path / "run" / "log.txt").read_text()


def test_checkpoints_hold_only_what_learns(whole):
    metadata = json.loads((whole / "checkpoints" / "12" / "state" / "_METADATA").read_text())["tree_metadata"]
    arrays = [path for path, entry in metadata.items() if entry["value_metadata"]["value_type"] != "None"]
    assert any("'kernel', 'a'" in path for path in arrays)
    assert not [path for path in arrays if "'base'" in path or "'embedding'" in path or "'frozen'" in path]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora(rank=4, alpha=8, dropout=0.1)", "pissa(rank=4, alpha=8)", "freeze(last=1)"])
def test_resumed_it_has_the_same_losses(method, base, whole, tmp_path):
    argv = arguments(base, tmp_path / "run", method)
    if "lora" in method:
        reference = whole
    else:
        reference = tmp_path / "whole"
        assert main.main(arguments(base, reference, method)) == 0
    assert main.main([*argv, "--config.train.steps=6"]) == 0
    (tmp_path / "run" / "record.json").unlink()
    assert main.main(argv) == 0
    assert runs.losses(tmp_path / "run") == runs.losses(reference)
    if "freeze" not in method:
        files = [(where / "adapter" / adapters.TENSORS).read_bytes() for where in (tmp_path / "run", reference)]
        assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.parametrize("method, form", [("dora(rank=4, alpha=8, dropout=0.1)", "float32"), ("lora(rank=4)", "nf4")])
def test_killed_and_resumed_the_adapter_is_the_same_bit_for_bit(method, form, base, tmp_path):
    options = {"quant": form, "train__steps": 40, "checkpoint__every": 8}
    status, output = runs.finish(runs.start(arguments(base, tmp_path / "a", method, **options)))
    assert status == 0, output
    argv = arguments(base, tmp_path / "b", method, **options)
    process = runs.start(argv)
    runs.when(tmp_path / "b", "step 20/40", process.kill)
    assert runs.finish(process)[0] == -signal.SIGKILL
    status, output = runs.finish(runs.start(argv))
    assert status == 0 and "resuming from step" in output, output
    assert runs.losses(tmp_path / "a") == runs.losses(tmp_path / "b")
    files = [(tmp_path / name / "adapter" / adapters.TENSORS).read_bytes() for name in "ab"]
    assert files[0] == files[1]


@pytest.mark.slow
def test_rounded_as_it_is_read_it_is_as_rounded_whole(base):
    """QLoRA's kernels, one by one off the disk or all of a tree at once, over eight devices."""
    argv = [f"--config={runs.ROOT}/configs/tune.py", *arguments(base, "x")[2:], "--config.quant=nf4(block=32)"]
    config, _, _ = main.parse([*argv, "--config.mesh=data=2, fsdp=2, tensor=2"])
    made = setup.prepare(config, logging.getLogger("test"))
    with jax.set_mesh(made.mesh):
        state = setup.create_state(made)
        kernel = state.frozen["groups"]["block_0"]["mixer"]["q"]["kernel"].base
        assert isinstance(kernel, NF4)
        assert kernel.values.sharding.spec == jax.sharding.PartitionSpec(None, "tensor", "fsdp")
    plain = made.source.load(nn.unbox(made.boxed), lm=made.lm)
    whole = quantize(plain, "nf4(block=32)", UNROUNDED)["groups"]["block_0"]["mixer"]["q"]["kernel"]
    jax.tree.map(np.testing.assert_array_equal, kernel, whole)


@pytest.mark.slow
def test_the_adapter_is_a_folder_of_pefts(whole, base):
    assert adapters.read_spec(whole / "adapter").startswith("lora(rank=4, alpha=8.0, dropout=0.1")
    config = json.loads((whole / "adapter" / adapters.CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(base / "model")
    assert "model.layers.1.mlp.down_proj" in config["target_modules"]


@pytest.mark.slow
def test_a_row_comes_out_where_peft_has_no_folder_for_the_family(base, tmp_path, monkeypatch):
    """peft adapts no out_proj of Mamba."""
    pytest.importorskip("torch")
    from convert import peers

    monkeypatch.setattr(peers, "VOCAB", 300)
    peers.reference("mamba").save_pretrained(tmp_path / "mamba")
    argv = arguments(base, tmp_path / "run", model__pretrained=tmp_path / "mamba", train__steps=2, checkpoint__every=2)
    assert main.main(argv) == 0
    assert json.loads((tmp_path / "run" / "record.json").read_text())["outcome"] == "ok"
    assert "no adapter was written: " in (tmp_path / "run" / "log.txt").read_text()
    assert not (tmp_path / "run" / "adapter").exists()


SWEEP = """
from efficientllm.sweep import Sweep

def get_config():
    return Sweep(
        name="rates", baseline="lora", variants={{name: f"configs/tune.py:{{name}}" for name in ("lora", "full")}},
        overrides={overrides!r}, seeds=(0,), equal={{"tokens": 0.0}}, twice=False,
        grid=("train.rates", ("(('.*', 0.001),)", "(('.*', 1.0),)")),
    )
"""


@pytest.mark.slow
def test_a_learning_rate_is_chosen_for_each_method_and_its_cost_told(base, tmp_path, monkeypatch, capsys):
    """Six processes: both rates of both methods, then each method at its own."""
    monkeypatch.chdir(runs.ROOT)
    monkeypatch.syspath_prepend(str(runs.ROOT))
    flags = [flag.removeprefix("--config.").split("=", 1) for flag in arguments(base, "x")[2:]]
    overrides = {key: value for key, value in flags if key not in ("adapter",)} | {"train.steps": 6}
    (tmp_path / "sweep.py").write_text(SWEEP.format(overrides=overrides))
    assert sweep.main([f"--config={tmp_path}/sweep.py", f"--out={tmp_path}/out"]) == 0
    variants = json.loads((tmp_path / "out" / "grid.json").read_text())["variants"]
    printed = capsys.readouterr().out
    for name, variant in variants.items():
        small, large = variant["tries"]
        assert large["eval_loss"] < small["eval_loss"] and variant["chosen"] == large["value"]
        assert min(small["seconds"], large["seconds"]) > 0
        (line,) = (line for line in printed.splitlines() if line.startswith(name) and line.endswith(variant["chosen"]))
        assert line.split()[2:5] == ["2", f"{small['seconds'] + large['seconds']:.0f}", "s"]
    rows = [json.loads(file.read_text()) for file in (tmp_path / "out").glob("*/record.json")]
    assert {row["config"]["train"]["rates"][0][1] for row in rows} == {1.0} and len(rows) == 2
    assert "What sweep rates chose" in (tmp_path / "out" / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"model__pretrained": "/nowhere"}, "config.model.pretrained = '/nowhere': no such file or folder"),
        ({"adapter": "dorra(rank=4)"}, "config.adapter = 'dorra': no adapter of that name"),
        ({"adapter": "freeze(last=3)"}, "the model has 2"),
        ({"adapter": "full", "quant": "nf4"}, "rounded weights cannot learn"),
        ({"quant": "int4(method='gptq')"}, "tuning rounds to the nearest"),
        ({"train__length": 300}, "config.train.length = 300"),
        ({"eval__also": "glyphs()"}, "config.eval.also = 'glyphs()': is read by models that are trained on text alone"),
        ({"eval__also": "doc_pair()"}, "did you mean 'doc_pairs'?"),
        ({"eval__also": "text(path='/nowhere')"}, "/nowhere"),
        ({"train__length": 8}, "config.train.length = 8: truncates every train response"),
        ({"tokenizer": "bpe(vocab_size=400)"}, "the vocabulary of config.model.size 300"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_input_is_one_line_and_status_2(overrides, message, base, tmp_path, capsys):
    assert main.main(arguments(base, tmp_path / "run", **overrides)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
