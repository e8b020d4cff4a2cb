"""Numbers in environment variables: what is none of theirs is a line, before anything waits for other processes."""

import pytest

from efficientllm import main
from efficientllm.runtime import distributed

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"JAX_COORDINATOR_ADDRESS": "here"}, "JAX_COORDINATOR_ADDRESS = 'here': must be HOST:PORT"),
        ({"JAX_COORDINATOR_ADDRESS": "here:99999"}, "must be HOST:PORT"),
        ({}, "JAX_NUM_PROCESSES is missing; set it"),
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID is missing; set it"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES = 'two': must be at least 1"),
        ({"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES = '0': must be at least 1"),
        ({"JAX_NUM_PROCESSES": "9" * 5000}, "JAX_NUM_PROCESSES"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID = '-1': must be at least 0"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "must be below JAX_NUM_PROCESSES = 2"),
        ({"JAX_COORDINATOR_ADDRESS": None, "SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS = 'many'"),
        ({"JAX_COORDINATOR_ADDRESS": None, "OMPI_COMM_WORLD_SIZE": ""}, "OMPI_COMM_WORLD_SIZE = ''"),
    ],
)
def test_a_number_that_is_none(environment, message, monkeypatch, capsys):
    for name, value in {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1234", **environment}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "_join", lambda **named: pytest.fail(f"joins {named}"))
    assert main.main(["--config=base"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
