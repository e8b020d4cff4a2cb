"""Workdir lock: one process at a time runs in a workdir, and a second one is refused.

The file `owner.json` names process, host, boot and start time. On one machine `flock` decides, which the kernel
releases when the process dies. Without file locks, and between machines, the content of the file decides.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import platform
import typing

from efficientllm.errors import UserError
from efficientllm.typing import PathLike

FILE = "owner.json"
Owner = dict[str, typing.Any]  # an `identity`
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Lock:
    """Exclusive ownership of `folder` from `acquire` to `release`."""

    def __init__(self, folder: PathLike):
        self._file = pathlib.Path(folder) / FILE
        self._descriptor: int | None = None

    def acquire(self) -> "Lock":
        """Takes the lock; an owner that has died is replaced.

        Raises UserError if another owner is alive, and OSError if the file cannot be written.
        """
        while True:
            descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                _lock(descriptor, self._file)
                if _is_current(descriptor, self._file):
                    _refuse_living(_read(descriptor), self._file)
                    _write(descriptor, identity())
                    self._descriptor = descriptor
                    return self
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # the owner removed this file while we opened it: try again

    def release(self) -> None:
        """Removes the owner's file if it belongs to this process."""
        if self._descriptor is None:
            return
        if _is_current(self._descriptor, self._file):
            with contextlib.suppress(OSError):  # the folder was removed
                self._file.unlink()
        os.close(self._descriptor)
        self._descriptor = None


def identity() -> Owner:
    """Identifies this process, also against a later process of the same number or after a reboot."""
    job = {key: os.environ[key] for key in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT") if key in os.environ}
    return {
        "pid": os.getpid(),
        "host": platform.node(),
        "boot": boot_id(),
        "started": start_time(os.getpid()),
        "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **({"job": job} if job else {}),
    }


def boot_id() -> str | None:
    """The kernel's random id of this boot, the same in all containers of a machine; None where there is none."""
    with contextlib.suppress(OSError):
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None for one that is gone or a zombie, or without /proc."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])


def is_alive(owner: Owner) -> bool | None:
    """Whether the process that `owner` (an `identity`) names still runs: True, False, or None from another machine."""
    this = identity()
    if _is_requeued(owner.get("job"), this.get("job")):
        return False
    same_boot = owner.get("boot") is not None and owner.get("boot") == this["boot"]
    if not same_boot and owner.get("host") != this["host"]:
        return None
    if not same_boot and None not in (owner.get("boot"), this["boot"]):
        return False  # this machine before a reboot
    if not pathlib.Path("/proc/self/stat").exists():
        return _exists(owner.get("pid"))
    return owner.get("started") is not None and start_time(owner.get("pid")) == owner["started"]


def _is_requeued(owner_job, this_job):
    """Whether Slurm has requeued the owner's job as this one, which it does only after the first has ended."""
    if not (isinstance(owner_job, dict) and this_job):
        return False
    if owner_job.get("SLURM_JOB_ID") != this_job.get("SLURM_JOB_ID"):
        return False
    return owner_job.get("SLURM_RESTART_COUNT", "0") != this_job.get("SLURM_RESTART_COUNT", "0")


def _exists(pid):
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _lock(descriptor, file):
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{_in_use(_read(descriptor), file)}; wait for it, or take another workdir") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _is_current(descriptor, file):
    """Whether the open file is still the one at its path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except OSError:
        return False


def _refuse_living(owner, file):
    if not owner:
        return
    alive = is_alive(owner)
    if alive is None:
        raise UserError(f"{_in_use(owner, file)}; if that process is gone, remove {file}")
    if alive and not (owner["pid"] == os.getpid()):
        raise UserError(f"{_in_use(owner, file)}; wait for it, or take another workdir")


def _in_use(owner, file):
    process = (
        f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('since')}" if owner else "another process"
    )
    return f"--workdir={file.parent}: {process} is running in it"


def _read(descriptor):
    """The owner in the file; {} for an empty or broken file, left by a process that died while writing."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    try:
        owner = json.loads(os.read(descriptor, 1 << 16))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _write(descriptor, owner):
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, (json.dumps(owner) + "\n").encode())
    os.fsync(descriptor)
