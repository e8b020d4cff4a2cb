"""Packages and files import downwards only, and the drawing shows the imports there are."""

import re

import pytest

import draw_imports
import efficientllm
import import_graph

pytestmark = pytest.mark.quick


def test_rooms_import_in_no_circle():
    assert import_graph.cycle(import_graph.rooms(import_graph.imports())) == []


def test_directories_import_in_no_circle():
    assert import_graph.cycle(import_graph.directories(import_graph.imports())) == []


def test_files_import_in_no_circle():
    assert import_graph.cycle(import_graph.imports()) == []


def test_a_circle_is_found():
    assert sorted(import_graph.cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}})) == ["b", "b", "c"]


def test_levels_and_arrows():
    arrows = {"a": {"b", "c", "d"}, "b": {"c"}, "c": {"d"}, "d": set(), "e": {"d"}}
    assert import_graph.levels(arrows) == [["a", "e"], ["b"], ["c"], ["d"]]
    assert import_graph.reduced(arrows) == {"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": set(), "e": {"d"}}


def test_the_drawing_shows_the_imports():
    arrows = import_graph.rooms(import_graph.imports())
    assert draw_imports.FILE.read_text() == draw_imports.svg(arrows), "stale: run python tests/draw_imports.py"


def test_the_map_names_every_room():
    text = (import_graph.ROOT / "efficientllm" / "README.md").read_text()
    rooms = re.findall(r"^\| \[?`([\w.]+?)(?:\.py|/)`", text, re.MULTILINE)
    assert sorted(rooms) == sorted(import_graph.rooms(import_graph.imports()))


def test_the_letters_of_shapes_stand_in_one_table():
    text = (import_graph.ROOT / "efficientllm" / "README.md").read_text()
    rows = re.findall(r"^\| ([A-Z]) \| (.+?) \|$", text, re.MULTILINE)
    sentence = ", ".join(f"{letter} {axis}" for letter, axis in rows)
    assert rows and sentence in " ".join(efficientllm.__doc__.split())
