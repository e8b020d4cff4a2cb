"""Leaderboards of folders: that of a report, or one that is made of the rows of a folder of runs."""

import dataclasses
import os
import pathlib
import typing
from collections.abc import Sequence

from efficientllm.errors import UserError
from efficientllm.report import find_rows, leaderboard
from efficientllm.untrusted import files, json_text

FILE = "leaderboard.json"
_NUMBERS = ("mean", "ratio", "low", "high")


@dataclasses.dataclass(frozen=True)
class Board:
    """A leaderboard as plain data (`leaderboard.build_leaderboard`), and the folder that it is of."""

    folder: pathlib.Path
    content: dict[str, typing.Any]


def read_boards(paths: Sequence[str | os.PathLike[str]]) -> list[Board]:
    """Reads a Board of each path, a report's folder or runs. Raises UserError for one that is missing, or is neither.

    A folder with a leaderboard.json is a report's. Of another folder the rows below it are read, and where there are
    none the reports below it.
    """
    boards: list[Board] = []
    for path in map(pathlib.Path, paths):
        if not files.is_there(path):
            raise UserError(f"{path}: no such folder; give a report's folder, or a folder of runs")
        if files.is_file(path / FILE):
            boards.append(read_board(path / FILE))
        elif reports := _reports_without_rows(path):
            boards += map(read_board, reports)
        else:
            rows = find_rows.collect_rows([path]).rows
            boards.append(Board(path, leaderboard.build_leaderboard(rows)))
    return boards


def read_board(file: pathlib.Path) -> Board:
    """Reads and checks a leaderboard.json. Raises UserError."""
    where = f"{file}: no leaderboard"
    content = json_text.read(file, where=where)
    if content.get("schema_version") != leaderboard.SCHEMA_VERSION:
        raise UserError(
            f"{file}: schema_version is {content.get('schema_version')!r}; this program reads "
            f"{leaderboard.SCHEMA_VERSION}"
        )
    for group in json_text.field(content, "groups", list, where):
        for key in ("sweep", "task", "device", "batch"):
            json_text.field(group, key, str, where)
        for variant in json_text.field(group, "variants", list, where):
            _check_variant(variant, where)
    return Board(file.parent, content)


def _check_variant(variant, where):
    json_text.field(variant, "variant", str, where)
    json_text.field(variant, "techniques", dict, where)
    for key, cell in json_text.field(variant, "cells", dict, where).items():
        if not isinstance(cell, dict):
            raise UserError(f"{where}: the cell {key} of {variant['variant']} is no object")
        for number in _NUMBERS:
            if cell.get(number) is not None:
                json_text.field(cell, number, "number", f"{where}: {key} of {variant['variant']}")


def _reports_without_rows(path):
    """The leaderboards below a folder that has no rows; a sweep has both, and its rows say more."""
    if not path.is_dir() or find_rows.files_below(path, "record.json") or find_rows.find_rows_files(path):
        return []
    return find_rows.files_below(path, FILE)
