"""A folder that stands under its name once it is whole; what a killed process left of one is removed by the next."""

import contextlib
import fcntl
import glob
import os
import pathlib
import re
import shutil

from efficientllm.errors import UserError
from efficientllm.untrusted import files

OWNER = ".being-written"  # locked for as long as its folder is written


@contextlib.contextmanager
def new_folder(folder):
    """A hidden folder beside `folder` that is renamed to it at the end. Raises UserError for one that holds something.

    Hidden folders of the same name whose process is gone are removed first: each may be as large as a model.
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
    """Removes what processes that are gone have left: no other has their lock."""
    for draft in folder.parent.glob(f".{glob.escape(folder.name)}-*"):
        is_ours = re.fullmatch(r"-\d+", draft.name.removeprefix(f".{folder.name}")) and files.is_file(draft / OWNER)
        if not is_ours or draft.is_symlink():
            continue
        with open(draft / OWNER) as owner:
            try:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # it is being written
                continue
            shutil.rmtree(draft, ignore_errors=True)


def _unwritable(folder, error):
    if isinstance(error, UserError):
        return error
    return UserError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}")
