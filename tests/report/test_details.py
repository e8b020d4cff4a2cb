"""Details of a report's row: the command that repeats it, and damaged folders."""

import json
import shlex

import pytest

from efficientllm import main
from efficientllm.config.plain import flatten, plain
from efficientllm.report import details, rerun_command, rows
from report import made

COMMANDS = [
    ["--config=configs/base.py"],
    ["--config=configs/moe.py", "--config.seed=7"],
    ["--config=configs/attention.py:nsa", "--config.train.clip=0", "--config.model.scan=False"],
    ["--config=configs/mixers.py:rwkv", "--config.model.pattern=('gqa', 'mqa | moe(num_experts=4, top_k=1)')"],
    ["--config=configs/position.py:alibi", "--config.train.rates=(('lora_b$', 16.0), ('.*', 1.0))"],
    ["--config=configs/tune.py:qlora", "--config.data=pairs(path='my data/it\\'s.jsonl')"],
    ["--config=configs/tune.py:lora_plus"],
    ["--config=configs/infer.py:int4", "--config.infer.prompts=('What?\\nWhy?', '$HOME `ls` \\'x\\' \"y\"')"],
    [
        "--config=configs/infer.py:nf4",
        "--config.infer.rules=(('ffn', 'int8()'),)",
        "--config.sample.prompt=a\nb -- é 中",
    ],
    ["--config=configs/base.py", "--config.train.schedule=constant(peak=1e-05)", "--config.quality.tasks=('study',)"],
]


def config_of(argv):
    return flatten(plain(main.parse(argv)[0]))


@pytest.mark.parametrize("argv", COMMANDS, ids=lambda argv: " ".join(argv)[9:60])
def test_the_command_is_parsed_back_to_the_rows_config(argv, tmp_path):
    config = config_of(argv)
    (row,) = _rows(tmp_path, config)
    words = shlex.split(rerun_command.rerun_command(row))
    assert words[:4] == ["python", "-m", "efficientllm.main", "--config=configs/base.py"]
    assert config_of(words[3:]) == config
    assert len(words) == 4 + sum(config[key] != value for key, value in config_of(COMMANDS[0]).items())


def _rows(folder, config):
    file = made.row(folder, al_s=0.5)
    record = json.loads(file.read_text())
    nested = {}
    for key, value in config.items():
        *path, last = key.split(".")
        target = nested
        for group in path:
            target = target.setdefault(group, {})
        target[last] = value
    file.write_text(json.dumps(record | {"config": nested}))
    return rows.read_rows([file])


def test_a_sweeps_run_without_a_config_repeats_its_arguments(tmp_path):
    file = made.row(tmp_path, outcome="invalid")
    record = json.loads(file.read_text())
    record["config"] = {"seed": 0, "command": ["--config=configs/moe.py", "--config.name=a b"]}
    file.write_text(json.dumps(record))
    (row,) = rows.read_rows([file])
    assert rerun_command.rerun_command(row) == "python -m efficientllm.main --config=configs/moe.py '--config.name=a b'"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"prompt": 1}', "\\x00"])
def test_a_damaged_sample_is_none(tmp_path, text):
    file = made.row(tmp_path / "runs", al_s=0.5)
    (file.parent / "samples").mkdir()
    (file.parent / "samples" / "generated.jsonl").write_text(text)
    details_of_run = details.run_details(rows.read_rows([file]), tmp_path)["runs"][str(file)]
    assert details_of_run["sample"] == "" and details_of_run["files"]["record.json"] == "runs/record.json"


def test_links_are_relative_and_quoted_and_texts_are_shared(tmp_path):
    files = [made.row(tmp_path / "a #1?" / str(seed), seed=seed, al_s=0.5) for seed in range(2)]
    (files[0].parent / "log.txt").write_text("x\nsample: 'once upon'\n")
    details_of_runs = details.run_details(rows.read_rows(files), tmp_path / "out")
    run = details_of_runs["runs"][str(files[0])]
    assert run["files"]["record.json"] == "../a%20%231%3F/0/record.json" and run["sample"] == "'once upon'"
    assert len(details_of_runs["texts"]) == len(set(details_of_runs["texts"])) == 2
    assert details_of_runs["texts"][run["numbers"]["al_s"][1]] == "test"
