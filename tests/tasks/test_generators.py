"""experiments/generators: tiny pipelines that diffusers reads, sweeps whose runs are valid, a run of one."""

import re
import shlex

import numpy as np
import pytest

import runs
from convert.denoiser_folders import diffusers
from efficientllm import main
from efficientllm.convert import check_denoiser, open_source
from efficientllm.errors import UserError
from efficientllm.record.row import read_record
from efficientllm.registry.plugins import import_file
from efficientllm.sweep import __main__ as sweep_command
from efficientllm.sweep import spec
from efficientllm.text_states.pipelines import open_prompt_encoders
from tiers import slow_except

pytestmark = pytest.mark.xdist_group("diffusers")
FOLDER = runs.ROOT / "experiments" / "generators"
writer, sweep = import_file(FOLDER / "pipelines.py"), import_file(FOLDER / "sweep.py")


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_except(["sd3", "wan"], "sd3"))
def test_diffusers_computes_the_same_with_a_tiny_pipeline(name, tmp_path):
    writer.write(name, tmp_path / name)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / name)
    assert type(pipeline).__name__ == writer.CLASSES[name]
    found = check_denoiser.compare_predictions(open_source(tmp_path / name))
    assert 0.5 < found["max_prediction"] < 50 and found["max_difference"] < 1e-5 * found["max_prediction"]
    texts = ["A turning left", ""]
    states = open_prompt_encoders(str(tmp_path / name)).encode(texts)
    others = {"prompt_2": None, "prompt_3": None} if name == "sd3" else {"max_sequence_length": 512}
    embedded = pipeline.encode_prompt(prompt=texts, negative_prompt=texts, **others)
    np.testing.assert_allclose(states.text_BSE, embedded[0].detach().numpy(), atol=1e-4)
    assert np.abs(states.text_BSE[0] - states.text_BSE[1]).max() > 0.1


def test_pipelines_are_not_written_over(tmp_path):
    (tmp_path / "sd3").mkdir()
    with pytest.raises(UserError, match=f"--out: {tmp_path}/sd3 is there already"):
        writer.main([f"--out={tmp_path}"])


README = (FOLDER / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
SWEEPS = [shlex.split(line.partition("efficientllm.sweep ")[2]) for line in COMMANDS if "efficientllm.sweep" in line]


def test_there_is_no_command_that_nothing_runs():
    others = [line for line in COMMANDS if "efficientllm.sweep" not in line]
    assert others[:2] == ["pip install -e '.[images,sweep]'", "python experiments/generators/pipelines.py"]
    assert all(line.startswith("python experiments/generators/plans.py") for line in others[2:])  # tests/plan has them
    assert {argv[0].rpartition(":")[2] for argv in SWEEPS} == set(sweep.MODELS)


@pytest.mark.parametrize("argv", SWEEPS, ids=lambda argv: " ".join(argv).rpartition("sweep.py:")[2])
def test_every_run_of_a_sweep_is_valid(argv, monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    monkeypatch.syspath_prepend(str(runs.ROOT))
    described = spec.load_sweep(argv[0].removeprefix("--config="))
    extra = [argument for argument in argv if argument.startswith("--config.")]
    for method in sweep.METHODS:
        parsed, *_ = main.parse(list(spec.argv_of(described, method, extra)))
        assert parsed.adapter.startswith(method) and parsed.train.steps * parsed.train.batch_size >= 480
        assert all(flag == f"--config.model.pretrained={parsed.model.pretrained}" for flag in extra)


def test_an_unknown_name_is_one_line(capsys, monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    assert sweep_command.main(["--config=experiments/generators/sweep.py:sd35-medium", "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert "no variant 'sd35-medium'; known: sd3, wan" in error and error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_a_run_has_a_row_and_samples_beside_those_of_its_base(name, tmp_path, monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    monkeypatch.syspath_prepend(str(runs.ROOT))
    writer.write(name, tmp_path / name)
    short = {"model.pretrained": tmp_path / name, "train.steps": 2, "eval.batches": 1, "checkpoint.every": 0}
    flags = [f"--config.{key}={value}" for key, value in short.items()]
    argv = spec.argv_of(spec.load_sweep(f"experiments/generators/sweep.py:{name}"), "lora", flags)
    assert main.main([*argv, f"--workdir={tmp_path / 'run'}"]) == 0
    assert np.isfinite(read_record(tmp_path / "run" / "record.json")["quality"]["eval_loss"])
    assert {"base.png", "grid.png"} <= {file.name for file in (tmp_path / "run" / "samples").iterdir()}
    assert (tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors").exists()
