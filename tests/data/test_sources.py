"""Where text comes from, and one clear line for whatever is wrong with it."""

import json

import pytest

from efficientllm import data
from efficientllm.data.corpus import Corpus
from efficientllm.errors import UserError
from efficientllm.registry import build

pytestmark = pytest.mark.quick


def documents(spec):
    return list(build("data", spec).documents())


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def parquet(path, **columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def test_text_files_come_in_the_order_of_their_names(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.txt", "d.md"):
        write(tmp_path / name, f"text of {name}\n")
    assert documents(f"text(path={str(tmp_path / '*.txt')!r})") == ["text of a.txt\n", "text of b.txt\n"]
    assert len(documents(f"text(path={str(tmp_path / '**' / '*.txt')!r})")) == 3


def test_a_single_big_file_becomes_documents_and_has_a_held_out_part(tmp_path):
    text = "".join(f"line {number} \u00e9\n" for number in range(3000)) + "x" * 5000
    spec = f"text(path={write(tmp_path / 'big.txt', text)!r}, document_size=2000)"
    pieces = documents(spec)
    assert "".join(pieces) == text and max(map(len, pieces)) <= 2000
    assert all(piece.endswith("\n") for piece in pieces if "x" not in piece)
    assert list(Corpus(spec).texts("held_out")) and list(Corpus(spec).texts("train"))


def test_few_documents_still_hold_one_out(tmp_path):
    lines = [json.dumps({"text": f"document {number}"}) for number in range(3)]
    spec = f"jsonl(path={write(tmp_path / 'few.jsonl', chr(10).join(lines))!r}, held_out=0.001)"
    assert len(list(Corpus(spec).texts("held_out"))) == 1
    assert list(Corpus(spec.replace("0.001", "0.0")).texts("held_out")) == []
    assert len(list(Corpus(spec.replace("0.001", "0.9999")).texts("train"))) == 1


def test_rows_of_jsonl_and_parquet_are_documents(tmp_path):
    rows = ["one\ntwo", "\u4f60\u597d", None, " \n", "three"]
    path = write(tmp_path / "rows.jsonl", "".join(json.dumps({"id": 1, "body": row}) + "\n" for row in rows))
    assert documents(f"jsonl(path={path!r}, field='body')") == ["one\ntwo", "\u4f60\u597d", "three"]
    path = parquet(tmp_path / "rows.parquet", id=[1] * 5, body=rows)
    assert documents(f"parquet(path={path!r}, field='body')") == ["one\ntwo", "\u4f60\u597d", "three"]


def test_no_file_matches(tmp_path):
    with pytest.raises(UserError, match=r"^data: path = '.*\*\.txt': no file matches; name a file"):
        documents(f"text(path={str(tmp_path / '*.txt')!r})")
    with pytest.raises(UserError, match="the folder has no file"):
        documents(f"text(path={str(tmp_path)!r})")
    (tmp_path / "below").mkdir()
    with pytest.raises(UserError, match=r"only folders match; write '.*/\*/\*\*' for what is in them"):
        documents(f"text(path='{tmp_path}/*')")
    with pytest.raises(UserError, match="name a file, a folder or a glob"):
        documents("text(path='')")


def test_a_name_may_hold_what_a_glob_gives_a_meaning(tmp_path):
    write(tmp_path / "we[ird] name.txt", "found")
    assert documents(f"text(path={str(tmp_path / 'we*.txt')!r})") == ["found"]


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_an_empty_file(tmp_path, kind):
    path = write(tmp_path / "empty", b"")
    with pytest.raises(UserError, match=r"empty is empty"):
        documents(f"{kind}(path={path!r})")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_missing_field_names_those_there_are(tmp_path, kind):
    rows = {"texts": ["a", "b"], "id": [1, 2]}
    if kind == "parquet":
        path = parquet(tmp_path / "rows.parquet", **rows)
    else:
        path = write(tmp_path / "rows.jsonl", "".join(json.dumps({"texts": "a", "id": n}) + "\n" for n in range(2)))
    with pytest.raises(UserError, match=r"no field 'text'; there are: texts, id; did you mean 'texts'\?"):
        documents(f"{kind}(path={path!r})")
    with pytest.raises(UserError, match=r"field 'id' holds int, not text"):
        documents(f"{kind}(path={path!r}, field='id')")


@pytest.mark.parametrize("before", [0, 10, (1 << 20) - 1, 3 << 20])
def test_a_file_that_is_not_utf8_names_the_byte(tmp_path, before):
    good = write(tmp_path / "a.txt", "fine")
    bad = write(tmp_path / "b.txt", b"x" * before + "\u00e9".encode() + b"\xff tail")
    with pytest.raises(UserError, match=rf"b\.txt: not UTF-8: byte {before + 2}; write it as UTF-8$"):
        documents(f"text(path={str(tmp_path / '*.txt')!r})")
    assert documents(f"text(path={good!r})") == ["fine"] and bad


def test_a_file_that_ends_within_a_character(tmp_path):
    path = write(tmp_path / "cut.txt", b"abc\xc3")
    with pytest.raises(UserError, match=r"cut\.txt: not UTF-8: byte 3; write it as UTF-8$"):
        documents(f"text(path={path!r})")


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": "a', "line 3: not JSON"),
        (b"plain words", "line 3: not JSON"),
        (b'["a"]', "line 3: a JSON object is needed, not list"),
        (rb'{"text": "\ud800"}', "line 3: half of a surrogate pair"),
        (b'{"text": "\xff"}', "not UTF-8: byte 42"),
    ],
)
def test_an_invalid_json_line(tmp_path, line, message):
    path = write(tmp_path / "rows.jsonl", b'{"text": "one"}\n{"text": "two"}\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"rows\.jsonl(, |: ){message}"):
        documents(f"jsonl(path={path!r})")


def test_what_is_no_parquet(tmp_path):
    path = write(tmp_path / "rows.parquet", b"no parquet at all, just words that go on for a while")
    with pytest.raises(UserError, match=r"rows\.parquet: is no Parquet file"):
        documents(f"parquet(path={path!r})")


def test_one_document_cannot_be_divided(tmp_path):
    path = write(tmp_path / "one.txt", "short")
    with pytest.raises(UserError, match="training and held-out text need two different documents, there is one"):
        data.describe_data(f"text(path={path!r})", data.build_tokenizer("bytes", "python_docs()"))


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_that_is_none(share):
    with pytest.raises(UserError, match="held_out = .*: must be at least 0 and below 1"):
        Corpus(f"python_docs(held_out={share})")
