"""Atomic creation of a folder: it appears under its name once complete; leftovers of killed processes are removed."""

import contextlib
import fcntl
import glob
import os
import pathlib
import re
import shutil
from collections.abc import Iterator

from efficientllm.errors import UserError
from efficientllm.untrusted import files

OWNER = ".being-written"  # locked while its folder is written


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a hidden folder that is renamed to `folder` at the end. Raises UserError if `folder` is not empty.

    Hidden folders that dead processes left for the same name are removed first: each may be as large as a model.
    """
    folder = pathlib.Path(folder)
    try:
        _check_free(folder)
        _remove_abandoned(folder)
        temporary = folder.with_name(f".{folder.name}-{os.getpid()}")
        temporary.mkdir(parents=True)
    except (OSError, ValueError) as error:
        raise _unwritable(folder, error) from None
    try:
        with open(temporary / OWNER, "w") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX)
            yield temporary
            (temporary / OWNER).unlink()
            if folder.exists():
                folder.rmdir()
            temporary.rename(folder)
    except OSError as error:
        raise _unwritable(folder, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_free(folder):
    if files.is_there(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds something already; name a new folder")


def _remove_abandoned(folder):
    """Removes hidden folders of dead processes: their lock is free."""
    for draft in folder.parent.glob(f".{glob.escape(folder.name)}-*"):
        has_our_name = re.fullmatch(r"-\d+", draft.name.removeprefix(f".{folder.name}")) and files.is_file(
            draft / OWNER
        )
        if not has_our_name or draft.is_symlink():
            continue
        with open(draft / OWNER) as owner:
            try:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # another process is writing it
                continue
            shutil.rmtree(draft, ignore_errors=True)


def _unwritable(folder, error):
    if isinstance(error, UserError):
        return error
    return UserError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}")
