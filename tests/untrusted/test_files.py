"""What is no regular file, or too large, or no JSON: one line at once, never a wait."""

import os
import socket

import pytest

from efficientllm.errors import UserError
from efficientllm.untrusted import files, json_text

pytestmark = pytest.mark.quick


@pytest.fixture(params=["fifo", "socket", "device", "folder", "loop", "missing", "long", "null", "dangling", "denied"])
def no_file(request, tmp_path, monkeypatch):
    where = tmp_path / "config.json"
    if request.param == "fifo":
        os.mkfifo(where)
    elif request.param == "socket":
        monkeypatch.chdir(tmp_path)  # a socket has a short path only
        socket.socket(socket.AF_UNIX).bind("config.json")
    elif request.param == "device":
        where.symlink_to("/dev/zero")
    elif request.param == "folder":
        where.mkdir()
    elif request.param == "loop":
        where.symlink_to(where)
    elif request.param == "dangling":
        where.symlink_to(tmp_path / "nowhere")
    elif request.param == "long":
        return tmp_path / ("x" * 5000)
    elif request.param == "null":
        return f"{tmp_path}/a\0b"
    elif request.param == "denied":
        return where / "inside"
    return where


@pytest.mark.filterwarnings("ignore:unclosed <socket")
def test_it_is_refused_at_once(no_file):
    assert not files.is_file(no_file)
    for read in (files.read_text, files.open_file, files.size_of, json_text.read):
        with pytest.raises(UserError) as error:
            read(no_file)
        assert "\n" not in str(error.value)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    file = tmp_path / "sparse.json"
    with open(file, "wb") as opened:
        opened.truncate(2**40)
    with pytest.raises(UserError, match=r"sparse.json: has 1,099,511,627,776 bytes; at most 67,108,864 are read"):
        json_text.read(file)
    with pytest.raises(UserError, match="has more than 100 bytes"):
        files.read_bytes("/proc/self/environ" if os.path.getsize("/proc/self/stat") else "/proc/cpuinfo", 100)


def test_text(tmp_path):
    (tmp_path / "bom").write_bytes(b"\xef\xbb\xbf{}")
    assert files.read_text(tmp_path / "bom") == "{}" and json_text.read(tmp_path / "bom") == {}
    (tmp_path / "latin").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(UserError, match="config.x = 'latin': .*latin is not UTF-8 .byte 7."):
        files.read_text(tmp_path / "latin", where="config.x = 'latin'")


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100_000, "nested deeper than 64"),
        ('{"a":' * 100_000, "nested deeper than 64"),
        ("[" * 80 + "]" * 80, "nested deeper than 64"),
        ('{"a": ' + "9" * 10_000 + "}", "a number of 10000 digits"),
        ('{"a": ' + "9" * 100 + "}", "a number of 100 digits"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ('{"\\udc00": 1}', "half of a surrogate pair"),
        ('{"a": 1', "not JSON (Expecting ',' delimiter: line 1, column 8)"),
        ("", "not JSON (Expecting value: line 1, column 1)"),
        ("[]", "holds []; an object is needed"),
        ("3", "holds 3; an object is needed"),
        ('{"a": 1, "a": 2}', "'a' is a repeated key"),
        (b'{"a": "\xff"}', "not JSON that can be read"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_json_that_is_refused(text, message):
    with pytest.raises(UserError) as error:
        json_text.parse(text, "config.json", unique=True)
    assert str(error.value).startswith("config.json: ") and message in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_json_that_is_taken():
    assert json_text.parse('{"limit": [0.0, Infinity, 1e400]}', "x") == {"limit": [0.0, float("inf"), float("inf")]}
    assert json_text.parse("[" * 60 + "]" * 60, "x", list)
    assert json_text.parse('{"a": "\\ud83d\\ude00"}', "x") == {"a": "\U0001f600"}
    assert json_text.parse("3", "x", None) == 3


@pytest.mark.parametrize("kind", [str, str.encode])
def test_depth(kind):
    assert (
        json_text.is_deep(kind("[" * 65))
        and json_text.is_deep(kind('{"a":' * 65))
        and not json_text.is_deep(kind("[" * 64))
    )
    assert not json_text.is_deep(kind('{"text": "' + "[{" * 500 + '\\"' + "[" * 500 + '"}'))
    assert not json_text.is_deep(kind("[]" * 500)) and not json_text.is_deep(kind('"' + "[" * 500))
    assert json_text.is_deep(kind('"a"' + '["]",' * 65))


def test_an_error_is_one_line_that_a_terminal_shows_as_it_is():
    assert str(UserError("a\nb\r\x1b[31m \ud800\u00e9\u2028x")) == "a b \\x1b[31m \\ud800\u00e9 x"
    assert len(str(UserError("x" * 10**6))) < 4100
