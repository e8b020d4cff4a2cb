"""Folders that are made once and read by every later run: the trained BPE, the tokenised corpus."""

import errno
import hashlib
import os
import shutil
import uuid
from pathlib import Path

from efficientllm.errors import UserError

_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)


def root(cache_dir=None):
    """Where cached folders live: `cache_dir`, else $EFFICIENTLLM_CACHE, else ~/.cache/efficientllm."""
    return Path(cache_dir or os.environ.get("EFFICIENTLLM_CACHE") or "~/.cache/efficientllm").expanduser()


def entry(cache_root, name, fill):
    """Path of the folder `name`; if absent, `fill(folder)` writes it first.

    The folder appears whole or not at all: it is filled under another name and renamed, and of several processes that
    fill it at once the first to finish wins. Raises UserError where the cache cannot be written.
    """
    final = cache_root / name
    if final.is_dir():
        return final
    try:
        cache_root.mkdir(parents=True, exist_ok=True)
        draft = cache_root / f".{name}-{uuid.uuid4().hex}"  # tempfile's folders are closed to those who share a cache
        draft.mkdir()
        try:
            fill(draft)
            _publish(draft, final)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise UserError(
            f"the data cache {cache_root} cannot be written ({error.strerror}); "
            "set EFFICIENTLLM_CACHE to a folder that can"
        ) from error
    return final


def digest(*parts):
    """Sixteen hexadecimal digits that name an entry by everything its content depends on."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


def stat_key(paths):
    """One string that changes when a file of `paths` is added, removed or written to, without reading any."""
    stats = [(str(path), os.stat(path)) for path in paths]
    return ";".join(f"{path}:{stat.st_size}:{stat.st_mtime_ns}" for path, stat in stats)


def _publish(draft, final):
    try:
        draft.rename(final)
    except OSError:
        if not final.is_dir():
            raise
