"""The files of experiments/cluster say what the command line and the scheduler understand."""

import re
import shlex
import subprocess

import pytest
import yaml
from sweep import cluster

import runs
from efficientllm import main

FOLDER = runs.ROOT / "experiments" / "cluster"


@pytest.fixture(scope="module")
def job():
    made = yaml.safe_load((FOLDER / "jobset.yaml").read_text())
    (replicated,) = made["spec"]["replicatedJobs"]
    return made["metadata"]["name"], replicated["name"], replicated["template"]["spec"]


def test_the_pods_of_a_jobset_are_the_processes_of_a_run(job):
    name, worker, spec = job
    (container,) = spec["template"]["spec"]["containers"]
    given = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert int(given["JAX_NUM_PROCESSES"]) == spec["parallelism"] == spec["completions"]
    assert given["JAX_COORDINATOR_ADDRESS"].partition(":")[0] == f"{name}-{worker}-0-0.{name}"
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in spec["template"]["spec"]["volumes"]
    }
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]


def test_the_commands_are_commands(job, monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    (container,) = job[2]["template"]["spec"]["containers"]
    commands = [container["args"]]
    for line in re.findall(r"^sbatch \S+ (.*)$", (FOLDER / "README.md").read_text(), re.MULTILINE):
        commands.append(shlex.split(line))
    assert len(commands) == 2
    for argv in commands:
        config, workdir, _ = main.parse(argv)
        assert workdir and "fsdp" in config.mesh and config.model.size == "1.5b"


@pytest.mark.slow
@pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing())
def test_the_script_runs_two_processes_on_slurm(tmp_path, monkeypatch):
    texts = runs.corpus(tmp_path / "texts")
    argv = runs.arguments(texts, tmp_path / "run", mesh="fsdp=2", train__steps=4, eval__every=0, checkpoint__every=0)
    with cluster.running(tmp_path / "slurm") as config:
        monkeypatch.setenv("SLURM_CONF", config)
        monkeypatch.setenv("PYTHONPATH", f"{runs.ROOT}")
        monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
        options = ["--wait", "--nodes=1", "--ntasks-per-node=2", "--overcommit", f"--output={tmp_path}/out.txt"]
        command = ["sbatch", *options, FOLDER / "train.sbatch", *argv]
        done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr + (tmp_path / "out.txt").read_text()
    assert "2 x cpu" in (tmp_path / "run" / "log.txt").read_text()
    assert sorted(runs.losses(tmp_path / "run")) == [1, 2, 3, 4]
