"""Two processes of four devices each are one run: the losses of one process with eight, whatever happens to them."""

import json
import signal
import socket

import numpy as np
import pytest
from test_runs import _when

import runs
from efficientllm import main

OPTIONS = {"train__steps": 36, "eval__every": 0, "mesh": "fsdp=4, tensor=2"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return runs.corpus(tmp_path_factory.mktemp("data") / "texts")


def start(*argvs):
    """A process of four devices for each command line, joined over a free port."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    return [
        runs.start(
            argv,
            devices=4,
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES=str(len(argvs)),
            JAX_PROCESS_ID=str(index),
        )
        for index, argv in enumerate(argvs)
    ]


def finish(processes):
    """Exit statuses and outputs, without what the transport says of itself."""
    statuses, outputs = zip(*(runs.finish(process, timeout=120) for process in processes), strict=True)
    lines = ([line for line in output.splitlines() if not line.startswith("[Gloo]")] for output in outputs)
    return list(statuses), list(lines)


def losses(workdir):
    return {
        step: np.frombuffer(value, np.float32).item() if isinstance(value, bytes) else value[0]
        for step, value in runs.losses(workdir).items()
    }


def test_killed_and_stopped_two_processes_give_the_losses_of_one(texts, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert main.main(runs.arguments(texts, one, **OPTIONS)) == 0
    argv = runs.arguments(texts, two, **OPTIONS)

    killed = start(argv, argv)
    _when(two, "step  6/36", lambda: [process.kill() for process in killed])
    assert finish(killed)[0] == [-signal.SIGKILL] * 2

    stopped = start(argv, argv)
    _when(two, "step 12/36", stopped[1].terminate)
    statuses, outputs = finish(stopped)
    assert statuses == [128 + signal.SIGTERM] * 2, outputs
    assert any("resuming from step 4" in line for line in outputs[0]) and "SIGTERM at step" in outputs[0][-1]
    assert not (two / "record.json").exists()

    statuses, outputs = finish(start(argv, argv))
    assert statuses == [0, 0], outputs
    assert any("resuming from step" in line for line in outputs[0]) and outputs[1] == []
    one_loss, two_loss = losses(one), losses(two)
    assert sorted(two_loss) == list(range(1, 37))
    np.testing.assert_allclose(
        [two_loss[at] for at in sorted(two_loss)], [one_loss[at] for at in sorted(one_loss)], rtol=1e-5
    )
    assert [file.name for file in two.rglob("record.json")] == ["record.json"]
    rows = [json.loads((workdir / "record.json").read_text()) for workdir in (one, two)]
    np.testing.assert_allclose(*(row["quality"]["eval_loss"] for row in rows), rtol=1e-5)

    statuses, outputs = finish(start(argv, argv))
    assert statuses == [0, 0] and "holds a finished run" in outputs[0][0] and outputs[1] == []


def test_what_stops_one_process_stops_all(texts, tmp_path):
    good = runs.arguments(texts, tmp_path / "run")
    statuses, outputs = finish(start(good, [*good, "--config.data=text(path='/nowhere/*.txt')"]))
    assert statuses == [2, 2]
    assert outputs[0][-1] == "efficientllm: process 1 cannot go on; it says why"
    assert len(outputs[1]) == 1 and "/nowhere" in outputs[1][0]
