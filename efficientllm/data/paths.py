"""Path resolution: the files of a path, a folder or a glob. Each file counts once, by identity, not by name."""

import errno
import fnmatch
import glob
import os
import stat

from efficientllm.errors import FieldError


def find_files(path: str, endings: tuple[str, ...] = ()) -> list[str]:
    """Finds the regular files that a path, folder or glob names, and returns their paths sorted.

    `**` matches any depth of folders. Names that begin with a dot match only a pattern that begins with one. Of several
    links to one file the first by name is returned. A folder stands for all files below it, or for those that end in
    one of `endings`. Raises UserError if there is no file.
    """
    if not path.strip() or "\0" in path:
        raise FieldError(
            "data", f"path = {path!r}: is no path; name a file, a folder or a glob such as 'texts/**/*.txt'"
        )
    pattern = os.path.abspath(os.path.expanduser(path))
    is_folder = os.path.isdir(pattern)
    matches = sorted(set(_match(os.sep, [*pattern.split(os.sep)[1:], *(["**"] if is_folder else [])])))
    if is_folder and endings:
        matches = [name for name in matches if name.lower().endswith(endings)]
    files = _distinct(matches)
    if not files:
        raise FieldError("data", f"path = {path!r}: {_reason(path, pattern, matches, endings if is_folder else ())}")
    return files


def _match(folder, patterns):
    """Paths below `folder` whose components match `patterns`. A component that exists literally is not a pattern."""
    if not patterns:
        yield folder
        return
    head, *rest = patterns
    if head == "**":
        for below in _folders(folder):
            yield from _match(below, rest or ["*"])
    elif glob.has_magic(head) and not os.path.lexists(os.path.join(folder, head)):
        for entry in _entries(folder):
            if fnmatch.fnmatchcase(entry.name, head) and (head.startswith(".") or not entry.name.startswith(".")):
                yield from _match(entry.path, rest)
    else:
        yield from _match(os.path.join(folder, head), rest)


def _folders(folder):
    """`folder` and those below it that are not hidden; links are followed, and none is visited twice."""
    seen, waiting = set(), [folder]
    while waiting:
        here = waiting.pop()
        identity = _identity(here)
        if identity is None or identity in seen:
            continue
        seen.add(identity)
        yield here
        waiting += [entry.path for entry in _entries(here) if not entry.name.startswith(".") and _is_folder(entry)]


def _entries(folder):
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name, reverse=True)
    except OSError:  # no folder, or one that is closed to us
        return []


def _is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(path):
    try:
        stats = os.stat(path)
    except OSError:
        return None
    return stats.st_dev, stats.st_ino


def _distinct(paths):
    """The regular files of `paths`, one for each that several names stand for."""
    files = {}
    for path in paths:
        if os.path.isfile(path):
            files.setdefault(_identity(path), path)
    return sorted(files.values())


def _reason(path, pattern, matches, endings):
    """Why there is no file."""
    if len(matches) == 1 and matches[0] == pattern and os.path.lexists(pattern):
        return _kind(pattern)
    if endings:
        plain = [ending for ending in endings if ending.count(".") == 1]
        return f"the folder has no file of the names *{', *'.join(plain)}; name another, or a glob"
    if any(map(os.path.isdir, matches)):
        return f"only folders match; write {os.path.join(path, '**')!r} for what is in them"
    return (
        f"{'the folder has no file' if os.path.isdir(pattern) else 'no file matches'}; name a file, a folder or a glob"
    )


def _kind(path):
    """What a path is that is no regular file."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        looped = error.errno == errno.ELOOP
        return (
            "a symbolic link to itself" if looped else f"a symbolic link to {os.readlink(path)!r}, which is not there"
        )
    kinds = {stat.S_ISFIFO: "a named pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a disk"}
    kind = next((name for is_kind, name in kinds.items() if is_kind(mode)), "no file")
    return f"{kind}; a regular file is needed, since data is read more than once"
