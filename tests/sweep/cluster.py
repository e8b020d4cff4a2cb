"""Slurm cluster of one node on this machine: Debian's munged, slurmctld and slurmd on their own files and ports."""

import contextlib
import os
import pathlib
import secrets
import shutil
import socket
import subprocess
import time

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing():
    """Names what this machine lacks for a cluster; empty if nothing."""
    lacks = [name for name in PROGRAMS if _which(name) is None]
    if lacks:
        return f"no {', '.join(lacks)}: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "slurmd runs as root only"


def _which(name):
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


@contextlib.contextmanager
def running(folder):
    """A cluster while the block runs; gives the value of SLURM_CONF. Raises RuntimeError if the node does not come."""
    folder = pathlib.Path(folder)
    folder.mkdir(mode=0o755)
    (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge.key").chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(folder=folder, host=host, ports=_free_ports(2), cores=os.cpu_count()))
    munge = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munge.pid", "seed-file": "seed"}
    daemons = (
        ("munged", "--foreground", "--force", *(f"--{flag}={folder / file}" for flag, file in munge.items())),
        ("slurmctld", "-D"),
        ("slurmd", "-D"),
    )
    with contextlib.ExitStack() as stack:
        for daemon in daemons:
            stack.enter_context(_daemon(daemon, folder, config))
            _until(lambda: (folder / "munge.sock").exists(), "munged does not answer")
        _until(lambda: "idle" in _ask("sinfo", "-h", "-o", "%T", config=config), "the node does not come up")
        yield str(config)


@contextlib.contextmanager
def _daemon(argv, folder, config):
    with open(folder / f"{argv[0]}.log", "wb") as log:
        process = subprocess.Popen(
            [_which(argv[0]), *argv[1:]], stdout=log, stderr=log, env={**os.environ, "SLURM_CONF": str(config)}
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ask(*argv, config):
    done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "SLURM_CONF": str(config)})
    return done.stdout


def _until(holds, message, seconds=30):
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise RuntimeError(message)
        time.sleep(0.1)


def _free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one_socket in sockets:
            one_socket.bind(("127.0.0.1", 0))
        return [one_socket.getsockname()[1] for one_socket in sockets]
