"""Two processes of two devices each are one run: the losses of a single process, whatever happens to them."""

import json
import os
import re
import signal
import socket
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

import runs
from convert import folders
from efficientllm import main
from efficientllm.errors import UserError
from efficientllm.runtime import distributed

pytestmark = pytest.mark.xdist_group("runs")  # with the other runs: they start processes of their own
STEPS = 24
# "[Gloo] Rank 3 is connected to 3 peer ranks. Expected number of connected peer ranks is : 3" of several threads at
# once, who write it in pieces: a line of these words alone, in any order.
GLOO = re.compile(r"(\[Gloo\]|Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|\d|\s)+")
OPTIONS = {"train__steps": STEPS, "eval__every": 0, "eval__batches": 1, "sample__tokens": 1}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return runs.corpus(tmp_path_factory.mktemp("data") / "texts")


def start(*argvs, devices=2):
    """A process of `devices` devices for each command line, joined over a free port."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    return [
        runs.start(
            argv,
            devices=devices,
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES=str(len(argvs)),
            JAX_PROCESS_ID=str(index),
        )
        for index, argv in enumerate(argvs)
    ]


def finish(processes, timeout=120):
    """Exit statuses and outputs, without what the transport says of itself, and the ends of its lines, which several
    threads write apart from the text."""
    statuses, outputs = zip(*(runs.finish(process, timeout=timeout) for process in processes), strict=True)
    lines = ([line for line in output.splitlines() if line and not GLOO.fullmatch(line)] for output in outputs)
    return list(statuses), list(lines)


def losses(workdir):
    """The losses of steps 1, 2... as numbers."""
    by_step = runs.losses(workdir)
    assert sorted(by_step) == list(range(1, STEPS + 1))
    return [loss for at in sorted(by_step) for loss in by_step[at]]


@pytest.fixture(scope="module")
def single_process(texts, tmp_path_factory):
    """A run of one process."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    assert main.main(runs.arguments(texts, workdir, **OPTIONS)) == 0
    return workdir


def same(several_processes, single_process):
    """The run of two processes ended as that of one: its losses, its held-out loss."""
    np.testing.assert_allclose(losses(several_processes), losses(single_process), rtol=1e-5)
    rows = [json.loads((workdir / "record.json").read_text()) for workdir in (single_process, several_processes)]
    np.testing.assert_allclose(*(row["quality"]["eval_loss"] for row in rows), rtol=1e-5)


def test_two_processes_give_the_losses_of_one(texts, single_process, tmp_path):
    argv = runs.arguments(texts, tmp_path / "two", mesh="fsdp=4", **OPTIONS)
    statuses, outputs = finish(start(argv, argv))
    assert statuses == [0, 0], outputs
    assert outputs[1] == []  # the first process speaks
    same(tmp_path / "two", single_process)


@pytest.mark.slow
def test_an_adapter_that_lies_on_two_processes_is_written_whole(tmp_path):
    folders.llama(tmp_path / "model", vocab_size=300)
    text = "".join(json.dumps({"prompt": f"{i} + {i}?", "response": f"{2 * i}"}) + "\n" for i in range(40))
    (tmp_path / "records.jsonl").write_text(text)
    values = {
        "model.pretrained": tmp_path / "model",
        "adapter": "dora(rank=4, alpha=8)",
        "data": f"pairs(path='{tmp_path}/records.jsonl', held_out=0.2)",
        "tokenizer": "bytes",
        "train.steps": 4,
        "train.batch_size": 8,
        "train.length": 32,
        "eval.every": 0,
        "eval.batches": 1,
        "sample.tokens": 0,
    }

    def argv(name, mesh):
        flags = [f"--config.{key}={value}" for key, value in (values | {"mesh": mesh}).items()]
        return [f"--config={runs.ROOT}/configs/tune.py", f"--workdir={tmp_path / name}", *flags]

    assert main.main(argv("one", "data=-1")) == 0
    statuses, outputs = finish(start(*[argv("two", "fsdp=4")] * 2))
    assert statuses == [0, 0], outputs
    single_adapter, joint_adapter = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two")
    )
    assert single_adapter.keys() == joint_adapter.keys()
    for name, array in single_adapter.items():
        np.testing.assert_allclose(joint_adapter[name], array, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_killed_and_stopped_two_processes_give_the_losses_of_one(texts, single_process, tmp_path):
    two = tmp_path / "two"
    argv = runs.arguments(texts, two, mesh="fsdp=4", **OPTIONS)

    killed = start(argv, argv)
    runs.when(two, "step  6/24", lambda: [process.kill() for process in killed])
    assert finish(killed)[0] == [-signal.SIGKILL] * 2

    stopped = start(argv, argv)
    runs.when(two, "step  8/24", stopped[1].terminate)
    statuses, outputs = finish(stopped)
    assert statuses == [128 + signal.SIGTERM] * 2, outputs
    assert "SIGTERM at step" in outputs[0][-1] and outputs[1] == []
    assert not (two / "record.json").exists()

    statuses, outputs = finish(start(argv, argv))
    assert statuses == [0, 0], outputs
    assert any("resuming from step" in line for line in outputs[0]) and outputs[1] == []
    same(two, single_process)


@pytest.mark.slow
def test_four_processes_whose_rows_lie_on_two_of_them(texts, single_process, tmp_path):
    """Two processes read the same rows, and each puts its quarter of their tokens on its devices."""
    argv = runs.arguments(texts, tmp_path / "four", mesh="fsdp=2, sequence=4", **OPTIONS)
    statuses, outputs = finish(start(argv, argv, argv, argv), timeout=400)
    assert statuses == [0] * 4, outputs
    same(tmp_path / "four", single_process)


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices_and_processes(texts, single_process, tmp_path):
    """Eight devices of one process, four of two, then four of one with rows divided."""
    folder = tmp_path / "run"

    def until(text, count, devices, mesh):
        argv = runs.arguments(texts, folder, mesh=mesh, **OPTIONS)
        processes = start(*[argv] * count, devices=devices)
        runs.when(folder, text, processes[0].terminate)
        statuses, outputs = finish(processes)
        assert statuses == [128 + signal.SIGTERM] * count, outputs

    until("step  3/24", 1, 8, "fsdp=8")
    until("step 11/24", 2, 2, "fsdp=4")
    argv = runs.arguments(texts, folder, mesh="fsdp=2, sequence=2", **OPTIONS)
    statuses, outputs = finish(start(argv, devices=4))
    assert statuses == [0] and any("resuming from step" in line for line in outputs[0]), outputs
    same(folder, single_process)


@pytest.mark.slow
def test_a_run_with_an_axis_of_experts_goes_on_with_other_devices_and_processes(texts, tmp_path):
    moe = "moe(num_experts=4, top_k=2, hidden=32, dispatch='capacity')"
    options = OPTIONS | {"model__ffn": moe}
    assert main.main(runs.arguments(texts, tmp_path / "one", **options)) == 0
    folder = tmp_path / "run"

    def command(mesh):
        return runs.arguments(texts, folder, mesh=mesh, **options)

    argv = command("fsdp=2, expert=4")
    (process,) = start(argv, devices=8)
    runs.when(folder, "step  3/24", process.terminate)
    assert finish([process])[0] == [128 + signal.SIGTERM]

    argv = command("expert=4")  # tokens travel from one process to the other
    statuses, outputs = finish(start(argv, argv))
    assert statuses == [0, 0] and any("resuming from step" in line for line in outputs[0]), outputs
    same(folder, tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_job_and_the_same_command_resumes(victim, texts, single_process, tmp_path):
    """The first process, which coordinates and writes, or another. The one that is left says so and ends at once."""
    two = tmp_path / "two"
    argv = runs.arguments(texts, two, mesh="fsdp=4", **OPTIONS)
    processes = start(argv, argv)
    runs.when(two, "step  8/24", processes[victim].kill)
    begin = time.monotonic()
    statuses, outputs = finish(processes, timeout=400)
    assert time.monotonic() - begin < 20
    assert statuses[victim] == -signal.SIGKILL and statuses[1 - victim] != 0, outputs
    if victim:
        assert statuses[0] == 75 and "where another process has died" in outputs[0][-1], outputs
        row = json.loads((two / "record.json").read_text())
        assert row["outcome"] == "crash"

    statuses, outputs = finish(start(argv, argv))
    assert statuses == [0, 0], outputs
    assert any("resuming from step" in line for line in outputs[0])
    same(two, single_process)


@pytest.mark.slow
def test_processes_that_mpirun_has_started_find_each_other(texts, single_process, tmp_path):
    """By the environment of Open MPI 4."""
    argv = runs.arguments(texts, tmp_path / "two", mesh="fsdp=4", **OPTIONS)
    job = os.getpid() % 4096 * 4096  # of which jax makes a port
    processes = [
        runs.start(
            argv,
            devices=2,
            OMPI_MCA_orte_hnp_uri=f"{job}.0;tcp://127.0.0.1:1",
            OMPI_COMM_WORLD_SIZE="2",
            OMPI_COMM_WORLD_RANK=str(rank),
            OMPI_COMM_WORLD_LOCAL_RANK="0",
        )
        for rank in range(2)
    ]
    assert finish(processes)[0] == [0, 0]
    same(tmp_path / "two", single_process)


@pytest.mark.parametrize(
    "environment, joins",
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, True),
    ],
)
def test_what_the_environment_tells_of(environment, joins, monkeypatch):
    calls = []
    for name in (*distributed.LAUNCHERS, "JAX_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: name == "kubernetes")
    monkeypatch.setattr(distributed.jax.config, "update", lambda *_: None)
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda **named: calls.append(named))
    distributed.initialise()
    assert bool(calls) == joins
    bound = calls[0].get("coordinator_bind_address") if joins else None
    assert bound == {"127.0.0.1:1": "127.0.0.1:1", "localhost:1": "127.0.0.1:1"}.get(
        environment.get("JAX_COORDINATOR_ADDRESS")
    )
    if "JAX_PROCESS_ID" in environment:
        assert (calls[0]["num_processes"], calls[0]["process_id"]) == (2, 1)


def test_a_launcher_that_jax_does_not_know_is_named(monkeypatch):
    def unknown(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setattr(distributed.jax.config, "update", lambda *_: None)
    monkeypatch.setattr(distributed.jax.distributed, "initialize", unknown)
    with pytest.raises(UserError, match="OMPI_COMM_WORLD_SIZE = 2: JAX finds no cluster.*JAX_COORDINATOR_ADDRESS"):
        distributed.initialise()


@pytest.mark.slow
def test_an_error_in_one_process_ends_all(texts, tmp_path):
    """Even one that nobody foresaw, while the others wait for it: a full disk under one writer, a bug."""
    broken = tmp_path / "broken.py"
    broken.write_text("""
import os
from efficientllm import sharding
to_device, calls = sharding.to_device, []
def breaks(batch, shardings):
    calls.append(batch)
    if len(calls) == 5 and os.environ["JAX_PROCESS_ID"] == "1":
        raise ZeroDivisionError("a bug")
    return to_device(batch, shardings)
sharding.to_device = breaks
""")
    argv = runs.arguments(texts, tmp_path / "run", mesh="fsdp=4", imports=f"('{broken}',)", **OPTIONS)
    processes = start(argv, argv)
    runs.when(tmp_path / "run", "step  3/24", lambda: None)
    begin = time.monotonic()
    statuses, outputs = finish(processes, timeout=400)
    assert time.monotonic() - begin < 20
    assert statuses == [75, 3] and len(outputs[1]) == 1, outputs
    assert f"ZeroDivisionError: a bug ({broken}:8, in breaks)" in outputs[1][0]
    assert "where another process has died" in outputs[0][-1]


def test_what_stops_one_process_stops_all(texts, tmp_path):
    good = runs.arguments(texts, tmp_path / "run")
    statuses, outputs = finish(start(good, [*good, "--config.data=text(path='/nowhere/*.txt')"]))
    assert statuses == [2, 2]
    assert outputs[0][-1] == "efficientllm: process 1 cannot continue; its own message says why"
    assert len(outputs[1]) == 1 and "/nowhere" in outputs[1][0]
