"""Limits of control groups, of both versions, as files that a test writes."""

import pytest

from efficientllm.metrics import cgroups, host

pytestmark = pytest.mark.quick

GB = 10**9


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(str(text))


def machine(tmp_path, cgroup, free_kb=20_000_000):
    write(tmp_path / "proc", meminfo=f"MemTotal: 24000000 kB\nMemAvailable: {free_kb} kB\n")
    write(tmp_path / "proc" / "self", cgroup=cgroup)
    return tmp_path / "proc", tmp_path / "cgroup"


def test_version_2_counts_every_group_around_the_process(tmp_path):
    proc, root = machine(tmp_path, "0::/user/job\n")
    write(root, memory__stat="")
    write(root / "user", memory__max=8 * GB, memory__current=5 * GB, memory__stat="inactive_file 1000000000\nx 3\n")
    write(root / "user" / "job", memory__max="max", memory__current=GB, memory__stat="anon 3\n")
    assert cgroups.memory_limits(proc, root) == [(8 * GB, 4 * GB)]
    assert host.memory_free_bytes(proc, root) == 4 * GB


def test_version_1_and_a_path_that_is_the_machine_s(tmp_path):
    proc, root = machine(tmp_path, "9:name=systemd:/\n4:memory:/docker/abc\n0::/\n")
    write(
        root / "memory",
        memory__limit_in_bytes=6 * GB,
        memory__usage_in_bytes=2 * GB,
        memory__stat="total_inactive_file 500000000\ntotal_active_file 500000000\n",
    )
    assert cgroups.memory_limits(proc, root) == [(6 * GB, 5 * GB)]


@pytest.mark.parametrize("cgroup", ["", "nonsense", "4:memory:/\n0::/\n"])
def test_no_limit_is_the_machine_s_memory(cgroup, tmp_path):
    proc, root = machine(tmp_path, cgroup)
    write(root / "memory", memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=GB)
    write(root, memory__max="max")
    assert cgroups.memory_limits(proc, root) == []
    assert host.memory_free_bytes(proc, root) == 20_000_000 * 1024


def test_a_container_s_limit_is_the_machine_s(monkeypatch):
    monkeypatch.setattr(host, "_limits", lambda: ((3 * GB, GB),))
    assert host.memory_total_bytes() == 3 * GB < host.physical_bytes()
