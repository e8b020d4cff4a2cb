"""The lock of a workdir: which process runs in it, so that a second one is told instead of mixing its files in.

The file `owner.json` names process, host, boot and start time. On one machine `flock` decides, which the kernel drops
when the process dies; where a file system has no locks, and between machines, what the file says does.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import platform

from efficientllm.errors import UserError

FILE = "owner.json"
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Lock:
    """Exclusive ownership of `folder` from `acquire` to `release`."""

    def __init__(self, folder):
        self._file = pathlib.Path(folder) / FILE
        self._descriptor = None

    def acquire(self):
        """Writes this process into the owner's file. Raises UserError if another one lives, OSError if none can be
        written; an owner that has died is replaced."""
        while True:
            descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                _lock(descriptor, self._file)
                if _is_still(descriptor, self._file):
                    _refuse_living(_read(descriptor), self._file)
                    _write(descriptor, identity())
                    self._descriptor = descriptor
                    return self
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # the owner of this file left and took it along: the next one decides

    def release(self):
        """Removes the owner's file, if it is this process's."""
        if self._descriptor is None:
            return
        if _is_still(self._descriptor, self._file):
            with contextlib.suppress(OSError):  # a folder that has been taken away
                self._file.unlink()
        os.close(self._descriptor)
        self._descriptor = None


def identity():
    """What tells this process from all others: also from a later one of the same number, and after a reboot."""
    job = {key: os.environ[key] for key in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT") if key in os.environ}
    return {
        "pid": os.getpid(),
        "host": platform.node(),
        "boot": boot_id(),
        "started": start_time(os.getpid()),
        "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **({"job": job} if job else {}),
    }


def boot_id():
    """The kernel's name for the time since it started, the same in all containers of a machine; None elsewhere."""
    with contextlib.suppress(OSError):
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None


def start_time(pid):
    """When a process started, in clock ticks since boot; None for one that is gone or a zombie, or without /proc."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])


def is_alive(owner):
    """Whether the process that `owner` (an `identity`) names still runs: True, False, or None from another machine."""
    mine = identity()
    if _is_requeued(owner.get("job"), mine.get("job")):
        return False
    same_boot = owner.get("boot") is not None and owner.get("boot") == mine["boot"]
    if not same_boot and owner.get("host") != mine["host"]:
        return None
    if not same_boot and None not in (owner.get("boot"), mine["boot"]):
        return False  # this machine before it was started anew
    if not pathlib.Path("/proc/self/stat").exists():
        return _answers(owner.get("pid"))
    return owner.get("started") is not None and start_time(owner.get("pid")) == owner["started"]


def _is_requeued(theirs, mine):
    """Whether Slurm has started the owner's job anew, as this one, which it does once the first has ended."""
    if not (isinstance(theirs, dict) and mine and theirs.get("SLURM_JOB_ID") == mine.get("SLURM_JOB_ID")):
        return False
    return theirs.get("SLURM_RESTART_COUNT", "0") != mine.get("SLURM_RESTART_COUNT", "0")


def _answers(pid):
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


def _is_still(descriptor, file):
    """Whether the open file is the one that stands under its name."""
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
    who = (
        f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('since')}" if owner else "another process"
    )
    return f"--workdir={file.parent}: {who} is running in it"


def _read(descriptor):
    """The owner that the file names; {} for an empty or broken file, which a process left that died while it wrote."""
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
