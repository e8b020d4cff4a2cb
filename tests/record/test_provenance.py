import json
import os
import subprocess

import jax
import pytest

from efficientllm.metrics.energy import reader as energy
from efficientllm.record import provenance
from metrics.energy.fake_nvml import Clock, FakeGpu, open_fake

pytestmark = pytest.mark.quick


@pytest.fixture
def repository(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=A", "-c", "user.email=a@example.org")
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "first")
    return tmp_path


def test_git_state_knows_commit_and_changes(repository):
    clean = provenance.git_state(repository)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (repository / "runs").write_text("written by a run")
    assert provenance.git_state(repository)["dirty"] is False
    (repository / "file").write_text("two")
    assert provenance.git_state(repository) == {"commit": clean["commit"], "dirty": True}


def test_outside_a_repository_or_without_git_it_is_null(tmp_path, monkeypatch):
    nothing = {"commit": None, "dirty": None}
    assert provenance.git_state(tmp_path) == nothing
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_state() == nothing


def test_a_row_says_where_it_comes_from():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    reader = energy.open_reader(jax.local_devices())
    data = provenance.provenance(
        reader=reader, started=0.0, ended=90.0, config_hash="abc", seed=3, mesh=mesh, kernels={"mha": "xla"}
    )
    assert json.loads(json.dumps(data)) == data
    assert data["mesh"] == {"data": 4, "tensor": 2} and data["kernels"] == {"mha": "xla"}
    assert (data["started"], data["ended"]) == ("1970-01-01T00:00:00+00:00", "1970-01-01T00:01:30+00:00")
    assert data["versions"]["jax"] == jax.__version__
    assert (data["devices"]["kind"], data["devices"]["count"]) == ("cpu", 8)
    assert data["devices"]["uuids"] is None and data["devices"]["driver"] is None
    assert "force_host_platform" in data["xla_flags"]
    assert data["devices"]["processes"] == 1


def test_gpus_give_uuid_driver_limit_and_clocks():
    clock = Clock()
    described = open_fake(clock, FakeGpu(clock)).describe()
    assert described["uuids"] == ["GPU-00000000:01:00.0"]
    assert (described["driver"], described["cuda"]) == ("580.65.06", "13.1")
    assert described["power_limit_w"] == [700.0] and described["clocks_mhz"] == [{"sm": 1980, "memory": 3201}]


def test_a_package_that_is_not_installed_is_null(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("jax", "no-such-package"))
    assert provenance.versions()["no-such-package"] is None


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system pins no process")
def test_a_pinned_process_has_the_cores_that_it_may_use():
    """Rows of one core and of two are rows of two devices."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert provenance.processor()["cores"] == 1
    finally:
        os.sched_setaffinity(0, before)
    assert provenance.processor()["cores"] == len(before)
