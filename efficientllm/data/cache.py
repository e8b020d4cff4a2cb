"""Data cache: folders that are made once and reused by later runs, such as a trained BPE or a tokenized corpus."""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
import typing
import uuid
from pathlib import Path

from efficientllm.errors import UserError
from efficientllm.runtime import user_cache
from efficientllm.typing import PathLike

_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)
CHECKSUMS = "checksums.json"
ABANDONED_S = 86_400  # how long an unfinished folder may lie untouched
log = logging.getLogger("efficientllm")
_checked: dict[Path, str] = {}  # folder: what its files were like when their checksums were right


def root(cache_dir: PathLike | None = None) -> Path:
    """Returns the folder of the cache: `cache_dir`, else the user's."""
    return user_cache.folder(cache_dir)


def entry(cache_root: Path, name: str, fill: typing.Callable[[Path], typing.Any]) -> Path:
    """Returns the path of the cached folder `name`; `fill(folder)` writes it first if it is absent or damaged.

    The folder is written under another name and renamed, so that it is never seen half written. Of several processes
    that write it at once, the first to finish wins. Checksums of its files are stored in it and checked on opening.
    Raises UserError where the cache cannot be written.
    """
    final = cache_root / name
    if final.is_dir() and _damage(final) is None:
        return final
    try:
        cache_root.mkdir(parents=True, exist_ok=True)
        if final.is_dir():
            _set_aside(final)
        _remove_abandoned(cache_root, name)
        draft = cache_root / f".{name}-{uuid.uuid4().hex}"  # tempfile's folders are closed to those who share a cache
        draft.mkdir()
        try:
            fill(draft)
            (draft / CHECKSUMS).write_text(json.dumps(_checksums(draft)))
            _publish(draft, final)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise UserError(
            f"EFFICIENTLLM_CACHE = {str(cache_root)!r}: cannot be written ({error.strerror}); name a folder that can"
        ) from error
    return final


def _checksums(folder):
    """`{name: sha256}` of a folder's files."""
    checksums = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != CHECKSUMS:
            with open(path, "rb") as file:
                checksums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return checksums


def _damage(folder):
    """What is wrong with an entry, or None. One that this process has checked is read again only if it was touched."""
    try:
        stats = stat_key(sorted(folder.iterdir()))
        if _checked.get(folder) == stats:
            return None
        written, actual = json.loads((folder / CHECKSUMS).read_text()), _checksums(folder)
    except FileNotFoundError:
        return "it has no checksums"
    except (OSError, ValueError) as error:
        return " ".join(str(error).split())
    if written != actual:
        names = sorted(set(actual) ^ set(written)) or [name for name in actual if actual[name] != written[name]]
        return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} not what was written"
    _checked[folder] = stats
    return None


def _set_aside(final):
    """Removes a damaged entry, unless another process has replaced it meanwhile: one at a time looks."""
    with open(final.with_name(".lock"), "w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not final.is_dir() or (damage := _damage(final)) is None:
            return
        log.warning(f"the cached {final} is damaged ({damage}); it is made again")
        aside = final.with_name(f".{final.name}-{uuid.uuid4().hex}")
        final.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _remove_abandoned(cache_root, name):
    """Removes what processes that were killed had begun of this entry."""
    for path in cache_root.glob(f".{name}-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(path, ignore_errors=True)


def digest(*values: object) -> str:
    """Hashes everything that an entry's content depends on to sixteen hexadecimal digits, for its name."""
    return hashlib.sha256("\0".join(map(str, values)).encode()).hexdigest()[:16]


def stat_key(paths: typing.Iterable[PathLike]) -> str:
    """Makes a string that changes when a file of `paths` is added, removed, replaced or written to, reading none.

    A time of modification can be set back, as `cp -p` and archives do; the time of the last change cannot.
    """
    stats = [(str(path), os.stat(path)) for path in paths]
    return ";".join(
        f"{path}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:{stat.st_ino}" for path, stat in stats
    )


def _publish(draft, final):
    try:
        draft.rename(final)
    except OSError:
        if not final.is_dir():
            raise
