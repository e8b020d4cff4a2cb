"""Recommendations whose answer is known by construction."""

import json
import shlex

import pytest

from efficientllm import main
from efficientllm.recommend import __main__ as recommend
from efficientllm.recommend.request import PUBLISHED
from efficientllm.sweep import __main__ as sweep
from recommend import boards

TUNE = ("--task=tune", "--model=smollm2-135m", "--device=rtx4090", "--by_shapes")
INFER = ("--task=infer", "--model=smollm2-135m", "--device=rtx4090", "--by_shapes")
SHORT = ("--config.train.length=64", "--config.train.batch_size=2")


def ask(capsys, *argv):
    """`(exit status, what was printed)`."""
    capsys.readouterr()
    status = recommend.main(list(argv))
    return status, capsys.readouterr().out


def answer(capsys, *argv):
    """The answer as JSON of a question that has one."""
    status, out = ask(capsys, *argv, "--json")
    assert status == 0
    return json.loads(out)


def card(folder, memory_bytes, **facts):
    """A device of so much memory, as a .json file."""
    file = folder / f"card_{round(memory_bytes)}.json"
    known = {"device_kind": "Card", "memory_bytes": memory_bytes, "bandwidth": 1e11}
    file.write_text(json.dumps(known | {"flops": {"bfloat16": 1e13, "tf32": 5e12}} | facts))
    return file


def test_the_best_by_evidence_is_chosen_and_the_difference_is_significant(tmp_path, capsys):
    evidence = boards.tuning(tmp_path / "rows", {"lora": 3.0, "dora": 2.7, "rslora": 2.85, "pissa": 3.3})
    flags = (*TUNE, *SHORT, f"--evidence={evidence}", "--limits=eval_loss <= -1 % and least eval_loss")
    told = answer(capsys, *flags)
    assert (told["choice"]["technique"], told["runner_up"]["technique"]) == ("dora", "rslora")
    figure = told["choice"]["evidence"]["eval_loss"]
    assert figure["ratio"] == pytest.approx(0.9) and figure["low"] <= 0.9 <= figure["high"] and figure["runs"] == 3
    assert figure["apart"] == pytest.approx(1) and told["choice"]["measured"]
    assert told["choice"]["setting"] == {"model.remat": "none", "train.accumulate": 1}
    fallen = {one["technique"]: one["reason"] for one in told["fell_out"]}
    assert fallen["lora"] == fallen["pissa"] == "beyond a limit, by evidence"
    assert fallen["loha"] == fallen["dora over int8"] == "without evidence"
    status, out = ask(capsys, *flags)
    assert status == 0 and "significant (the choice is better in 100.0% of draws)" in " ".join(out.split())
    assert "rank" not in told["choice"]["technique"]  # the preset's own, as rank and alpha are equal


def test_a_device_on_which_only_the_smallest_form_fits(tmp_path, capsys):
    evidence = boards.serving(tmp_path / "rows", {"bfloat16": 2.7, "int8": 2.71, "int4": 3.0, "float32": 2.69})
    small = card(tmp_path, 100e6)
    told = answer(
        capsys, *INFER[:2], f"--device={small}", "--by_shapes", f"--evidence={evidence}", "--limits=least eval_loss"
    )
    assert told["choice"]["technique"] == "int4" and told["runner_up"] is None
    assert told["choice"]["planned"]["peak_memory_bytes"] <= 100e6
    fallen = {one["technique"]: one for one in told["fell_out"]}
    assert {fallen[name]["reason"] for name in ("bfloat16", "int8", "float32")} == {"do not fit into memory"}
    assert "of 100 MB" in fallen["int8"]["why"] and fallen["nf4"]["reason"] == "without evidence"
    roomy = answer(capsys, *INFER, f"--evidence={evidence}", "--limits=least eval_loss")
    assert roomy["choice"]["technique"] == "float32" and roomy["runner_up"]["technique"] == "bfloat16"
    limited = answer(capsys, *INFER, f"--evidence={evidence}", "--limits=memory <= 100 MB and least eval_loss")
    assert limited["choice"]["technique"] == "int4"


def test_a_limit_that_nothing_keeps_has_no_answer(tmp_path, capsys):
    evidence = boards.serving(tmp_path / "rows", {"bfloat16": 2.7, "int8": 2.71})
    status, out = ask(capsys, *INFER, f"--evidence={evidence}", "--limits=eval_loss <= -50 % and least tpot_s")
    assert status == 1 and "no answer: nothing keeps all limits" in out
    text = " ".join(out.split())
    assert "bfloat16 (eval_loss 1x, the baseline)" in text and "int8 (eval_loss 1.004x (1.004 to 1.004))" in text
    status, out = ask(capsys, *INFER, f"--evidence={evidence}", "--limits=tpot_s <= 1 us")
    assert status == 1 and "beyond a limit, planned" in out


@pytest.mark.parametrize(("task", "name"), [("tune", "tuning"), ("infer", "quantization"), ("pretrain", "attention")])
def test_without_evidence_the_sweep_that_would_supply_it_is_named(tmp_path, capsys, monkeypatch, task, name):
    evidence = boards.write(tmp_path / "rows", "other", {"a": ({}, {"al_s": 1.0})}, "a")
    model = "tiny" if task == "pretrain" else "smollm2-135m"
    flags = (f"--task={task}", f"--model={model}", "--by_shapes", f"--evidence={evidence}")
    status, out = ask(capsys, *flags, "--limits=eval_loss <= +1 %")
    assert status == 1 and "no answer: no evidence of eval_loss" in out
    (command,) = [line for line in out.splitlines() if line.startswith("python -m efficientllm.sweep")]
    parsed, extra = sweep._parse(shlex.split(command)[3:])
    assert parsed["config"] == f"experiments/{name}/sweep.py" and parsed["out"] == f"runs/{name}"
    assert any(model in flag for flag in extra)


def test_an_interval_that_holds_the_limit_is_told(tmp_path, capsys):
    evidence = boards.serving(tmp_path / "rows", {"bfloat16": 2.7}, seeds=3)
    for seed, loss in enumerate((2.60, 2.72, 2.76)):  # 0.5 % below the baseline, and anything from -8 % to +7 %
        boards.serving(tmp_path / f"rows/{seed}", {"int8": loss}, seeds=seed + 1)
    for folder in [path for path in (tmp_path / "rows").glob("[0-9]/*-int8") if path.name[0] != path.parent.name]:
        (folder / "record.json").unlink()
    flags = (*INFER, f"--evidence={evidence}", "--limits=eval_loss <= +1 % and least tpot_s")
    status, out = ask(capsys, *flags)
    assert status == 0
    assert "not sure: the interval of eval_loss reaches beyond 'eval_loss <= +1 %'" in " ".join(out.split())


def test_equals_are_told_to_be_tied(tmp_path, capsys):
    evidence = boards.tuning(tmp_path / "rows", {"lora": 3.0, "rslora": 3.0, "dora": 3.0})
    flags = (*TUNE, *SHORT, f"--evidence={evidence}", "--limits=eval_loss <= +1 % and least al_s")
    told = answer(capsys, *flags)
    assert (told["choice"]["technique"], told["runner_up"]["technique"]) == ("lora", "rslora")
    assert told["choice"]["value"] == told["runner_up"]["value"] and not told["choice"]["measured"]
    assert "tied in al_s: lora, rslora;" in told["difference"][0]
    better = boards.tuning(tmp_path / "better", {"lora": 3.0, "rslora": 2.99, "dora": 3.0})
    told = answer(capsys, *flags[:-2], f"--evidence={better}", flags[-1])
    assert told["choice"]["technique"] == "rslora"


def test_a_size_is_answered_by_evidence_of_a_smaller_one_with_the_distance_said(tmp_path, capsys):
    evidence = boards.serving(tmp_path / "rows", {"bfloat16": 2.7, "int8": 2.71})
    flags = ("--task=infer", "--model=1.5b", "--device=rtx4090", "--by_shapes", f"--evidence={evidence}")
    status, out = ask(capsys, *flags, "--limits=eval_loss <= +1 % and least tpot_s")
    text = " ".join(out.split())
    assert status == 0 and "measured on 134.5 M, asked for 1.544 G: 11.5x apart" in text
    command = shlex.split(out.splitlines()[-1])[3:]
    config, _, _ = main.parse(command)
    assert config.model.pretrained == PUBLISHED["1.5b"] and config.quant == "int8()"
    status, out = ask(capsys, *flags, "--limits=eval_loss <= 3 and least tpot_s")
    assert status == 1 and "was measured on another model, 11.5x apart" in " ".join(out.split())


def test_the_command_line_is_the_candidate_that_was_planned(tmp_path, capsys):
    evidence = boards.tuning(tmp_path / "rows", {"lora": 3.0, "dora": 2.9}, rank=8)
    flags = (*TUNE, *SHORT, f"--evidence={evidence}", "--config.metrics.price=2.5", "--limits=least eval_loss")
    choice = answer(capsys, *flags)["choice"]
    assert choice["technique"] == "dora(rank=8, alpha=16)"
    config, workdir, overwrite = main.parse(shlex.split(choice["command"])[3:])
    assert (workdir, overwrite) == (None, False) and config.task == "tune"
    assert (config.adapter, config.quant) == ("dora(rank=8, alpha=16)", "float32")
    assert config.model.pretrained == "smollm2-135m" and config.model.precision == "bfloat16"
    assert (config.train.batch_size, config.train.length, config.metrics.price) == (2, 64, 2.5)
    planned = choice["planned"]
    assert planned["usd_per_run"] == pytest.approx(planned["al_s"] * config.train.steps * 2.5 / 3600)


def test_what_was_measured_on_this_machine_is_ranked_in_its_batch(tmp_path, capsys):
    from efficientllm.record import provenance

    here = {"host": {"processor": provenance.processor()}}
    variants = {
        name: ({"model.mixer": name, "model.size": "tiny"}, {"al_s": seconds, "eval_loss": 5.0})
        for name, seconds in (("gqa", 0.5), ("mqa", 0.4), ("mha", 0.7))
    }
    batch = {"train.batch_size": 4, "train.length": 64}
    flags = ("--task=pretrain", "--model=tiny", "--by_shapes", "--limits=least al_s")
    options = {"told": here, "shared": batch, "parameters": 1_049_728.0}
    evidence = boards.write(tmp_path / "rows", "pretrain", variants, "gqa", **options)
    flags = [flag for flag in flags if flag != "--by_shapes"]
    told = answer(capsys, *flags, f"--evidence={evidence}", "--config.tokenizer=bpe(vocab_size=2048)")
    assert (told["choice"]["technique"], told["runner_up"]["technique"]) == ("mqa", "gqa")
    assert told["choice"]["measured"] and told["choice"]["value"] == pytest.approx(0.4, rel=0.01)
    assert told["choice"]["setting"] == batch
    for finalist in (told["choice"], told["runner_up"]):  # which the compiler of this machine has seen
        assert finalist["compiled_bytes"] > finalist["planned"]["resident_weight_bytes"]
    elsewhere = options | {"told": {"host": {"processor": {"name": "Other", "cores": 2}}}}
    evidence = boards.write(tmp_path / "elsewhere", "pretrain", variants, "gqa", **elsewhere)
    told = answer(capsys, *flags, "--by_shapes", f"--evidence={evidence}", "--config.train.length=64")
    assert not told["choice"]["measured"]


def test_evidence_of_random_weights_or_of_two_of_one_technique_says_nothing(tmp_path, capsys):
    random = boards.serving(tmp_path / "random", {"bfloat16": 2.7, "int8": 2.71}, pretrained="")
    flags = (*INFER, "--limits=eval_loss <= +1 %")
    assert ask(capsys, *flags, f"--evidence={random}")[0] == 1
    twins = {"bfloat16": {"quant": "bfloat16"}, "a": {"quant": "int8()"}, "b": {"quant": "int8()", "eval.every": 7}}
    variants = {name: (changes, {"eval_loss": 2.7}) for name, changes in twins.items()}
    shared = {"model.pretrained": "smollm2-135m"}
    evidence = boards.write(tmp_path / "twins", "infer", variants, "bfloat16", shared=shared)
    told = answer(capsys, *flags, f"--evidence={evidence}")
    assert told["choice"]["technique"] == "bfloat16" and told["runner_up"] is None
    twin = boards.write(tmp_path / "twin", "infer", {"a": variants["a"], "b": variants["b"]}, "a", shared=shared)
    assert recommend.main([*flags, f"--evidence={twin}"]) == 1
    assert "twin: sweep made: its baseline is no technique of its own" in capsys.readouterr().err


@pytest.mark.quick
@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--task=tune",), "--model=... is missing"),
        (("--task=train", "--model=1.5b"), "--task=train: is none of pretrain, tune, infer"),
        (("--task=tune", "--model=tiny"), "no weights of that size are published"),
        (("--task=pretrain", "--model=smollm2-135m"), "pre-training begins without weights"),
        (("--task=tune", "--model=1.5b", "--device=abacus"), "--device = 'abacus': no such hardware"),
        (("--task=tune", "--model=1.5b", "--devices=two"), "--devices=two: must be a whole number"),
        (("--task=tune", "--model=1.5b", "--devices=0"), "--devices=0: must be at least 1"),
        (("--task=tune", "--model=1.5b", "--limits=least al_x"), "--limits: no metric 'al_x'; did you mean 'al_s'?"),
        (("--task=tune", "--model=1.5b", "--limits=al_s <= +1 %"), "is planned, and has no baseline; write a value"),
        (("--task=tune", "--model=1.5b", "--evidence=nowhere"), "nowhere: no such folder"),
        (("--task=tune", "--model=1.5b", "--limit=x"), "did you mean '--limits'?"),
        (("--task=tune", "--model=1.5b", "--json=yes"), "--json=yes: is a switch"),
        (("--task=tune", "--model=1.5b", "--config.train.stps=3"), "config.train.stps"),
        (("--task=tune", "--model=1.5b", "--config.train.steps=0"), "config.train.steps = 0"),
    ],
)
def test_bad_input_is_one_line(argv, says, capsys):
    assert recommend.main(list(argv)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and says in lines[0]
