"""The files of experiments/cluster say what the command line and the scheduler understand."""

import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess

import pytest
import yaml

import runs
from efficientllm import main
from efficientllm.runtime import distributed
from efficientllm.tasks import training
from sweep import cluster

FOLDER = runs.ROOT / "experiments" / "cluster"


@pytest.fixture(scope="module")
def job():
    made = yaml.safe_load((FOLDER / "jobset.yaml").read_text())
    (replicated,) = made["spec"]["replicatedJobs"]
    return made["metadata"]["name"], replicated["name"], replicated["template"]["spec"]


def test_the_pods_of_a_jobset_are_the_processes_of_a_run(job):
    name, worker, spec = job
    (container,) = spec["template"]["spec"]["containers"]
    environment = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert int(environment["JAX_NUM_PROCESSES"]) == spec["parallelism"] == spec["completions"]
    assert environment["JAX_COORDINATOR_ADDRESS"].partition(":")[0] == f"{name}-{worker}-0-0.{name}"
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in spec["template"]["spec"]["volumes"]
    }
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert {2, training.FAILED} == set(rule["onExitCodes"]["values"]) and distributed.LOST != training.FAILED


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


# What jax asks of Kubernetes, and the answers of a cluster with the JobSet's two pods on this machine.
KUBERNETES = """
from types import SimpleNamespace as Some
from jax._src.clusters.k8s_cluster import K8sCluster

named = K8sCluster.get_coordinator_address
def on_this_machine(timeout_secs, override_coordinator_port):
    host, _, port = named(timeout_secs=None, override_coordinator_port=override_coordinator_port).partition(":")
    assert host == "NAME-WORKER-0-0.NAME", host
    return f"localhost:{port}"
K8sCluster.get_coordinator_address = on_this_machine
K8sCluster._namespace = lambda: "default"

owner = Some(controller=True, kind="Job")
pod = Some(metadata=Some(name="pod", labels={"job-name": "NAME-WORKER-0"}, owner_references=[owner]), spec=None)
labels = {"jobset.sigs.k8s.io/jobset-name": "NAME"}
job = Some(metadata=Some(name="NAME-WORKER-0", labels=labels), spec=Some(parallelism=2))
config = Some(load_incluster_config=lambda: None)
client = Some(
    CoreV1Api=lambda: Some(list_namespaced_pod=lambda **_: Some(items=[pod])),
    BatchV1Api=lambda: Some(read_namespaced_job=lambda **_: job),
    exceptions=Some(ApiException=OSError),
)
"""


@pytest.mark.slow
def test_pods_without_the_three_variables_find_each_other_through_kubernetes(job, tmp_path):
    """Through jax's own detection, and the coordinator is the one that the JobSet names."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "kubernetes.py").write_text(KUBERNETES.replace("NAME", job[0]).replace("WORKER", job[1]))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {"PYTHONPATH": f"{tmp_path}/fake", "HOSTNAME": "localhost", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    texts, folder = runs.corpus(tmp_path / "texts"), tmp_path / "run"
    argv = runs.arguments(texts, folder, mesh="fsdp=2", train__steps=4, eval__every=0, checkpoint__every=0)
    pods = [
        runs.start(argv, JAX_COORDINATOR_PORT=port, JOB_COMPLETION_INDEX=str(index), **common) for index in range(2)
    ]
    ended = [runs.finish(pod) for pod in pods]
    assert [status for status, _ in ended] == [0, 0], ended
    assert "2 x cpu" in (folder / "log.txt").read_text()
    assert sorted(runs.losses(folder)) == [1, 2, 3, 4]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Starts the script of two processes on a cluster of one node, waiting for its end."""
    options = ["--wait", "--nodes=1", "--ntasks-per-node=2", "--overcommit", f"--output={tmp_path}/out.txt"]
    with cluster.running(tmp_path / "slurm") as config:
        monkeypatch.setenv("SLURM_CONF", config)
        monkeypatch.setenv("PYTHONPATH", f"{runs.ROOT}")
        monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
        yield lambda argv: subprocess.Popen(["sbatch", *options, FOLDER / "train.sbatch", *argv], cwd=runs.ROOT)


@pytest.mark.slow
@pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing())
def test_the_script_runs_two_processes_on_slurm(slurm, tmp_path):
    texts = runs.corpus(tmp_path / "texts")
    argv = runs.arguments(texts, tmp_path / "run", mesh="fsdp=2", train__steps=4, eval__every=0, checkpoint__every=0)
    assert slurm(argv).wait(500) == 0, (tmp_path / "out.txt").read_text()
    assert "2 x cpu" in (tmp_path / "run" / "log.txt").read_text()
    assert sorted(runs.losses(tmp_path / "run")) == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing())
def test_a_job_whose_time_is_over_is_requeued_and_resumes(slurm, tmp_path):
    """Slurm keeps a requeued job for two minutes."""
    texts, folder = runs.corpus(tmp_path / "texts"), tmp_path / "run"
    argv = runs.arguments(texts, folder, mesh="fsdp=2", train__steps=24, eval__every=0, checkpoint__every=0)
    job = slurm(argv)
    # To the processes, not to the script: as `#SBATCH --signal=TERM@300` does.
    runs.when(folder, "step  3/24", lambda: subprocess.run(["scancel", "--signal=TERM", "--name=efficientllm"]))
    assert job.wait(500) == 0, (tmp_path / "out.txt").read_text()
    log = (folder / "log.txt").read_text()
    assert "SIGTERM at step 10" in log and "resuming from step 10" in log, log
    assert sorted(runs.losses(folder)) == list(range(1, 25))


@pytest.mark.slow
@pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing())
def test_a_process_that_dies_ends_the_job(slurm, tmp_path):
    """srun ends the others, and the same command resumes."""
    texts, folder = runs.corpus(tmp_path / "texts"), tmp_path / "run"
    argv = runs.arguments(texts, folder, mesh="fsdp=2", train__steps=24, eval__every=0, checkpoint__every=4)
    job = slurm(argv)
    runs.when(folder, "step  8/24", lambda: _kill(folder, 1))
    assert job.wait(60) not in (0, 143)
    assert slurm(argv).wait(300) == 0, (tmp_path / "out.txt").read_text()
    assert "resuming from step" in (folder / "log.txt").read_text()
    assert sorted(runs.losses(folder)) == list(range(1, 25))


def _kill(folder, rank):
    """Kills the process of this rank, the one of its command line and Slurm's number."""
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            argv, environment = ((process / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:  # it has ended meanwhile
            continue
        ours = argv[1:3] == [b"-m", b"efficientllm.main"] and f"--workdir={folder}".encode() in argv
        if ours and f"SLURM_PROCID={rank}".encode() in environment:
            os.kill(int(process.name), signal.SIGKILL)
