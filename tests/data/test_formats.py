"""Files as people have them: formats, compression, encodings, layouts of records, links, and what is passed over."""

import bz2
import gzip
import json
import lzma
import os

import pyarrow
import pyarrow.parquet
import pytest

from efficientllm import data
from efficientllm.data import conversation, row_readers
from efficientllm.data.corpus import Corpus
from efficientllm.errors import UserError
from efficientllm.registry import build

pytestmark = pytest.mark.quick


def documents(spec):
    return list(build("data", spec).documents())


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def read(spec):
    """Documents, and what is said of them."""
    source = build("data", spec)
    return list(source.documents()), source.notes()


def zstd(content):
    return pyarrow.Codec("zstd").compress(content).to_pybytes()


COMPRESSIONS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}
ROWS = [{"prompt": f"Q{i}", "response": f"A{i}", "text": f"one\u2028two {i}"} for i in range(3)]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
CSV = b"prompt,response,text\r\n" + b"".join(f"Q{i},A{i},one\u2028two {i}\r\n".encode() for i in range(3))
TEXTS = [row["text"] for row in ROWS]


@pytest.mark.parametrize("packed", COMPRESSIONS)
@pytest.mark.parametrize("name", ["", "x"])
def test_every_source_reads_every_compression_whatever_the_name(tmp_path, packed, name):
    ending = f".{packed}" if name == "" else ""
    plain = write(tmp_path / "plain.jsonl", JSONL)
    path = write(tmp_path / f"rows.jsonl{ending}", COMPRESSIONS[packed](JSONL))
    table = write(tmp_path / f"rows.csv{ending.upper()}", COMPRESSIONS[packed](CSV))
    assert documents(f"jsonl(path={path!r})") == documents(f"csv(path={table!r})") == TEXTS
    assert documents(f"text(path={path!r})") == [JSONL.decode()]
    assert documents(f"pairs(path={path!r})") == documents(f"pairs(path={table!r})")
    assert documents(f"pairs(path={path!r})") == documents(f"pairs(path={plain!r})")


def test_one_folder_of_every_format(tmp_path):
    write(tmp_path / "a.jsonl", JSONL)
    write(tmp_path / "sub" / "b.JSON", json.dumps(ROWS, indent=1))
    write(tmp_path / "c.csv", CSV)
    write(tmp_path / "d.TSV", CSV.replace(b",", b"\t"))
    write(tmp_path / "e.csv", CSV.replace(b",", b";"))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "f.PARQUET")
    write(tmp_path / "notes.md", "no rows")
    write(tmp_path / ".hidden.jsonl", "no rows")
    for source in ("jsonl", "csv", "parquet"):
        texts, notes = read(f"{source}(path={str(tmp_path)!r})")
        assert sorted(texts) == sorted(6 * TEXTS) and notes == ["read 18 documents of 6 files"]
    texts, notes = read(f"pairs(path={str(tmp_path)!r})")
    assert len(texts) == 18 and notes == ["read 18 records of 6 files: 'prompt', 'response'"]


def test_only_the_fields_that_are_named_are_read(tmp_path):
    write(tmp_path / "a.jsonl", '{"text": "a", "note": null, "n": 1}\n{"text": "b", "n": "one"}\n')
    write(tmp_path / "b.jsonl", '{"text": "c", "note": "x", "other": {"deep": [1, "two"]}}\n')
    assert documents(f"jsonl(path='{tmp_path}/*.jsonl')") == ["a", "b", "c"]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["b"], "more": [1]}), tmp_path / "b.parquet")
    assert documents(f"parquet(path='{tmp_path}/*.parquet')") == ["a", "b"]
    write(tmp_path / "a.csv", ",,text,n,n\n0,1,a,2,3\n")
    assert documents(f"csv(path='{tmp_path}/a.csv')") == ["a"]


CONVERSATION = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "A"},
]
LAYOUTS = {
    "openai": {"messages": CONVERSATION},
    "openai parts": {
        "messages": [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in CONVERSATION]
    },
    "a list": CONVERSATION,
    "json in a field": {"messages": json.dumps(CONVERSATION)},
    "sharegpt": {"conversations": [{"from": "human", "value": "U"}, {"from": "gpt", "value": "A"}], "system": "S"},
    "sharegpt system": {
        "conversations": [{"from": r, "value": v} for r, v in (("system", "S"), ("human", "U"), ("gpt", "A"))]
    },
    "alpaca": {"instruction": "U", "input": "", "output": "A", "system": "S"},
    "openorca": {"system_prompt": "S", "question": "U", "response": "A"},
    "completion": {"system": "S", "prompt": "U", "completion": "A"},
    "conversational": {"prompt": CONVERSATION[:2], "completion": CONVERSATION[2:]},
    "question": {"system": "S", "question": "U", "answer": "A"},
    "capitals": {"System": "S", "Question": "U", "Answer": "A"},
    "roles in capitals": {"messages": [{**turn, "role": turn["role"].upper()} for turn in CONVERSATION]},
    "labelled": {"system": "S", "prompt": "U", "completion": "A", "label": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source", ["pairs", "chat"])
def test_layouts_are_recognised(tmp_path, layout, source):
    """By either source, in lines, in an array over several lines, and in one object."""
    row = LAYOUTS[layout]
    contents = [f"{json.dumps(row)}\n" * 2, json.dumps([row, row], indent=2)]
    if isinstance(row, dict):
        contents += [json.dumps([row, row]), json.dumps({"version": 1, "data": [row, row]}, indent=2)]
    for content in contents:
        path = write(tmp_path / "rows.json", content)
        assert [json.loads(text) for text in documents(f"{source}(path={path!r})")] == [CONVERSATION] * 2


def turns(text):
    return [(turn["role"], turn["content"]) for turn in json.loads(text)]


def test_alpaca_keeps_its_input_and_its_history(tmp_path):
    row = {"instruction": "Add", "input": "1 2", "output": "3", "history": [["Hi", "Hello"]]}
    path = write(tmp_path / "rows.json", json.dumps([row]))
    conversations, notes = read(f"pairs(path={path!r}, system='Be brief')")
    expected = [
        ("system", "Be brief"),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Add\n1 2"),
        ("assistant", "3"),
    ]
    assert [turns(text) for text in conversations] == [expected]
    assert notes == ["read 1 record of 1 file: Alpaca's 'instruction', 'input', 'output', 'history'"]


def test_fields_that_are_named_win(tmp_path):
    path = write(tmp_path / "rows.csv", "instruction,output,frage,antwort\na,b,c,d\n")
    (conversation,) = documents(f"pairs(path={path!r}, prompt='frage', response='antwort')")
    assert turns(conversation) == [("user", "c"), ("assistant", "d")]


@pytest.mark.parametrize("chosen", ["C", [("assistant", "C")], [("user", "P"), ("assistant", "C")]])
def test_of_preferences_the_chosen_answer_is_learnt_if_asked(tmp_path, chosen):
    as_turns = chosen if isinstance(chosen, str) else [{"role": role, "content": text} for role, text in chosen]
    row = {"prompt": "P", "chosen": as_turns, "rejected": "R"}
    path = write(tmp_path / "rows.jsonl", json.dumps(row))
    with pytest.raises(UserError, match=r"write pairs\(path=..., response='chosen'\)"):
        documents(f"pairs(path={path!r})")
    (conversation,) = documents(f"pairs(path={path!r}, response='chosen')")
    assert turns(conversation) == [("user", "P"), ("assistant", "C")]


def test_records_without_an_answer_are_counted_and_passed_over(tmp_path):
    rows = [("a", "b"), ("a", ""), (None, "b"), ("a", None), ("c", "d")]
    lines = [json.dumps({"prompt": prompt, "response": response}) for prompt, response in rows]
    path = write(tmp_path / "rows.jsonl", "\n".join(lines))
    conversations, notes = read(f"pairs(path={path!r})")
    assert len(conversations) == 2 and notes[0] == "read 2 records of 1 file: 'prompt', 'response'"
    assert notes[1:] == [
        f"skipped 2: records without an answer (the first: {path}, line 2)",
        f"skipped 1: records without a prompt (the first: {path}, line 3)",
    ]
    path = write(tmp_path / "none.jsonl", lines[1])
    with pytest.raises(UserError, match="no record to learn from: skipped 1: records without an answer"):
        documents(f"pairs(path={path!r})")


def test_a_turn_that_calls_a_tool_says_nothing_else(tmp_path):
    call = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    rows = [
        {"messages": [{"role": "user", "content": "U"}, {"role": "assistant", "content": None, "tool_calls": call}]},
        {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "A"}]},
    ]
    path = write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    (conversation,), notes = read(f"chat(path={path!r})")
    assert json.loads(conversation)[1] == {"role": "assistant", "content": "", "tool_calls": call}
    assert "skipped 1: records with a turn of no text" in notes[1]


@pytest.mark.parametrize("spell", [list, json.dumps])
def test_tools_go_with_their_conversation(tmp_path, spell):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    rows = [{"messages": CONVERSATION, "tools": spell(tools)}, {"messages": CONVERSATION, "tools": None}]
    path = write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    conversations = documents(f"chat(path={path!r})")
    assert conversations == [conversation.dump(CONVERSATION, tools), conversation.dump(CONVERSATION)]
    write(tmp_path / "rows.jsonl", json.dumps({"messages": CONVERSATION, "tools": 3}))
    with pytest.raises(UserError, match="line 1: field 'tools' holds 3; it is a list of functions"):
        documents(f"chat(path={path!r})")


def test_a_table_is_not_read_as_text(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: is a Parquet file; write parquet\(path=...\)"):
        documents(f"text(path='{tmp_path}/a.parquet')")


def test_answers_that_are_labelled_as_bad_are_not_learnt(tmp_path):
    rows = [{"prompt": "U", "completion": text, "label": text == "good"} for text in ("good", "bad")]
    path = write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    (conversation,), notes = read(f"pairs(path={path!r})")
    assert turns(conversation)[1] == ("assistant", "good")
    assert "skipped 1: records labelled as answers that are not wanted" in notes[1]


def test_a_dialogue_in_a_text_is_its_turns(tmp_path):
    text = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: More\n\nAssistant: No"
    path = write(tmp_path / "rows.jsonl", json.dumps({"chosen": text, "rejected": "x"}))
    (conversation,) = documents(f"pairs(path={path!r}, response='chosen')")
    assert turns(conversation) == [("user", "Hi"), ("assistant", "Hello"), ("user", "More"), ("assistant", "No")]


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.tsv", 'id\ttext\n1\t"hi" he said\n2\t"open\n', ['"hi" he said', '"open']),
        ("a.tsv", 'id\ttext\n1\t"a\tb"\n2\t"say ""x"""\n', ["a\tb", 'say "x"']),
        ("a.csv", "text\nhello, world; yes\nbye\n", ["hello, world; yes", "bye"]),
        ("a.csv", "id,text\r1,a\r2,b\r", ["a", "b"]),
        ("a.csv", 'id,text\r\n1,"a\r\nb"\r\n2,"c\rd"\r\n', ["a\r\nb", "c\rd"]),
    ],
)
def test_tables_as_spreadsheets_and_others_write_them(tmp_path, name, content, expected):
    path = write(tmp_path / name, content)
    assert documents(f"csv(path={path!r})") == expected


def test_an_empty_file_is_no_reason_to_refuse_a_folder(tmp_path):
    for name, content in (("__init__.py", ""), ("blank.py", " \n"), ("a.py", "a = 1\n")):
        write(tmp_path / "package" / name, content)
    texts, notes = read(f"text(path='{tmp_path}/**/*.py')")
    assert texts == ["a = 1\n"] and notes[0] == "read 1 document of 2 files"
    assert [note.partition(" (")[0] for note in notes[1:]] == [
        "skipped 1: empty files",
        "skipped 1: files of white space alone",
    ]
    write(tmp_path / "none" / "a", ""), write(tmp_path / "none" / "b", "")
    with pytest.raises(UserError, match="all 2 files are empty"):
        documents(f"text(path='{tmp_path}/none')")


def test_links_are_read_once_and_loops_end(tmp_path):
    write(tmp_path / "a.txt", "a")
    (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
    os.link(tmp_path / "a.txt", tmp_path / "c.txt")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "gone.txt")
    (tmp_path / "self.txt").symlink_to(tmp_path / "self.txt")
    for name in ("here", "again"):
        (tmp_path / name).symlink_to(tmp_path, target_is_directory=True)
    for path in (tmp_path, tmp_path / "**", tmp_path / "**" / "*.txt", tmp_path / "*.txt"):
        assert documents(f"text(path='{path}')") == ["a"]
    with pytest.raises(UserError, match="a symbolic link to '.*gone.txt', which is not there"):
        documents(f"text(path='{tmp_path}/broken.txt')")


def test_what_is_no_file_is_named_and_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match="a named pipe; a regular file is needed"):
        documents(f"jsonl(path='{tmp_path}/pipe.jsonl')")
    with pytest.raises(UserError, match="a device; a regular file"):
        documents("text(path='/dev/zero')")
    with pytest.raises(UserError, match="no file matches"):
        documents(f"jsonl(path='{tmp_path}/*.jsonl')")
    with pytest.raises(UserError, match="no file matches"):
        documents(f"text(path='/{'x' * 9000}')")


@pytest.mark.parametrize("source", ["text", "jsonl", "pairs"])
def test_a_folder_with_brackets_in_its_name(tmp_path, source):
    write(tmp_path / "we[ird] {name}" / "a[1].jsonl", JSONL)
    for path in ("we[ird] {name}/*.jsonl", "we[ird] {name}/a[1].jsonl", "we[ird] {name}", "we*/a?1?.jsonl"):
        assert documents(f"{source}(path={str(tmp_path / path)!r})")


@pytest.mark.parametrize("source, content", [("text", b"a\n"), ("jsonl", JSONL), ("csv", CSV), ("pairs", JSONL)])
def test_a_byte_order_mark_is_no_character(tmp_path, source, content):
    plain = write(tmp_path / "plain", content)
    marked = write(tmp_path / "marked", b"\xef\xbb\xbf" + content)
    assert documents(f"{source}(path={marked!r})") == documents(f"{source}(path={plain!r})")
    wide = write(tmp_path / "wide", content.decode().encode("utf-16"))
    with pytest.raises(UserError, match="wide: not UTF-8: byte 0; it is UTF-16, which `iconv"):
        documents(f"{source}(path={wide!r})")


def test_line_ends_are_line_feeds_and_characters_stay_as_they_are(tmp_path):
    path = write(tmp_path / "a.txt", "one\r\ntwo\rthree\nA\u030a \u212b \ufb01 \x00 \u2028.")
    assert documents(f"text(path={path!r})") == ["one\ntwo\nthree\nA\u030a \u212b \ufb01 \x00 \u2028."]
    body = "\r\n".join(json.dumps({"text": f"{i}\r\n\x00\u0085\u2028e\u0301"}, ensure_ascii=False) for i in range(3))
    path = write(tmp_path / "a.jsonl", body)
    assert documents(f"jsonl(path={path!r})") == [f"{i}\r\n\x00\u0085\u2028e\u0301" for i in range(3)]
    long = "x" * (12 << 20)  # more than a block of Arrow's reader
    path = write(tmp_path / "b.jsonl", json.dumps({"text": long}) + '\n\n{"text": "y"}')
    assert documents(f"jsonl(path={path!r})") == [long, "y"]


WRONG = [
    ("a.jsonl", b'{"text": "a"}\n{"text": ' + b"[" * 100_000, "line 2: JSON that is nested too deep"),
    ("a.jsonl", b'{"text": "a"}\n{"text": 1' + b"0" * 9000 + b"}", "line 2: not JSON that can be read"),
    ("a.json", b"[" * 100_000, "line 1: JSON that is nested too deep"),
    ("a.json", b'[\n{"text": "a"},\n{"text": "b"\n]', "line 4: not JSON|line 3: not JSON"),
    ("a.json", b'[\n{"text": "a"}\n{"text": "b"}]', "line 3: not JSON (a comma or"),
    ("a.json", b'[{"text": "a"}]\n]', "line 1: field 'text'|line 2: not JSON|line 1: a JSON object"),
    ("a.jsonl", b'{"text": 5}', "line 1: field 'text' holds int, not text"),
    ("a.json", b'[{"text": "a"},\n 3]', "line 2: a JSON object is needed, not int"),
    ("a.json", b'{"v": 1,\n "data": [{"text": "a"}, null]}', "record 2: a JSON object is needed, not NoneType"),
    ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}', "line 2: no field 'text'; there are: txt; did you mean 'txt'"),
    ("a.csv", b'text,n\na,1\n"b\nb",2,3\n', "line 3: 3 fields under a header of 2"),
    ("a.csv", b'text,n\n"a,1\n', "line 2: not CSV"),
    ("a.csv", b"text,n,text\na,1,b\n", "the header has the field 'text' twice"),
    ("a.csv", b"n,m\na,1\n", "line 1: no field 'text'; there are: n, m"),
    ("a.parquet", b"PAR1 and no more", "is no Parquet file"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n{"text')[:-9], "cannot be read"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n{"text"'), "line 2: not JSON"),
    ("a.jsonl.gz", gzip.compress(JSONL)[:20] + b"\0" * 30, "cannot be read"),
    ("a.jsonl.zst", zstd(JSONL)[:-4], "cannot be read"),
    ("a.jsonl", b"PK\x03\x04....", "is a zip archive or a spreadsheet; unpack it"),
    ("a.jsonl", b"a" + b"\0" * 256 + b"ustar" + b"\0" * 300, "is a tar archive; unpack it"),
]


@pytest.mark.parametrize("name, content, message", WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_named_with_its_place(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError) as error:
        documents(f"jsonl(path={path!r})")
    assert any(alternative in str(error.value) for alternative in message.split("|")), error.value
    assert path in str(error.value) and "\n" not in str(error.value)


def test_a_line_that_is_no_record_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("efficientllm.data.streams.LINE_BYTES", 1000)
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n' + "x" * 2000)
    with pytest.raises(UserError, match="a.jsonl, line 2: longer than"):
        documents(f"jsonl(path={path!r})")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "a")
    monkeypatch.setattr("efficientllm.data.streams.open", _closed, raising=False)
    with pytest.raises(UserError, match=r"a.txt: cannot be read \(Permission denied\)"):
        documents(f"text(path={path!r})")


def _closed(*_, **__):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("size", [0, -1])
def test_a_document_has_characters(tmp_path, size):
    path = write(tmp_path / "a.txt", "words " * 100)
    with pytest.raises(UserError, match=f"document_size={size}"):
        documents(f"text(path={path!r}, document_size={size})")


def test_one_document_is_cut_so_that_a_part_can_be_held_out(tmp_path):
    text = "".join(f"Line {number} of a short README.\n" for number in range(300))
    for name, spec in (("a.md", "text"), ("a.jsonl", "jsonl")):
        path = write(tmp_path / name, json.dumps({"text": text}) if spec == "jsonl" else text)
        corpus = Corpus(f"{spec}(path={path!r})")
        sides = {side: list(corpus.texts(side)) for side in ("train", "held_out")}
        assert sides["held_out"] and sorted("".join(sides["train"] + sides["held_out"])) == sorted(text)
        assert data.check_data(corpus.spec)[-1].startswith("one document of 8,")
        tokens = corpus.documents(data.build_tokenizer("bytes", corpus.spec))
        assert len(tokens["held_out"]) == len(sides["held_out"]) == corpus.summary["held_out_documents"]


def test_the_fingerprint_follows_every_byte_that_is_used_and_no_path(tmp_path):
    def fingerprint(path, spec="pairs"):
        return Corpus(f"{spec}(path={str(path)!r})").summary["fingerprint"]

    path = tmp_path / "one" / "rows.jsonl"
    write(path, JSONL)
    first, text = fingerprint(path), fingerprint(path, "jsonl")
    stat = os.stat(path)
    for old, new in ((b"Q1", b"Q7"), (b"A2", b"A7")):
        write(path, JSONL.replace(old, new))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a copy that keeps times, of the same size
        assert fingerprint(path) != first and fingerprint(path, "jsonl") == text
    write(path, JSONL)
    (tmp_path / "one").rename(tmp_path / "two")
    write(tmp_path / "rows.json.gz", gzip.compress(json.dumps(ROWS).encode()))
    assert fingerprint(tmp_path / "two" / "rows.jsonl") == fingerprint(tmp_path / "rows.json.gz") == first


def test_a_conversation_in_a_parquet_file(tmp_path):
    rows = [{"messages": CONVERSATION, "extra": 1}, {"messages": CONVERSATION[1:], "extra": 2}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    conversations = documents(f"chat(path='{tmp_path}/a.parquet')")
    assert conversations == [conversation.dump(CONVERSATION), conversation.dump(CONVERSATION[1:])]


def test_rows_of_a_table_have_the_columns_that_were_chosen(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x"], "b": [1]}), tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    assert list(row_readers.read_rows(path, "json", lambda names, where: names[:1])) == [(f"{path}, row 1", {"a": "x"})]
