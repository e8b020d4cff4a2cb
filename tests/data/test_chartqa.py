"""ChartQA in both of its layouts: the same questions, split by chart, and what is refused."""

import io
import json
import pathlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from efficientllm.errors import UserError
from efficientllm.registry import build

pytestmark = pytest.mark.quick
QUESTIONS = [
    ("a.png", "What is A?", "1.5", "human"),
    ("a.png", "Is A above B?", "Yes", "human"),
    ("b.png", "What is B?", "12%", "human"),
    ("c.png", "What is C?", "7", "augmented"),
]


def png(number):
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(np.full((8, 9, 3), number, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(params=["original", "zip", "hub", "hub_names"])
def folder(request, tmp_path):
    """A folder of a layout: the authors', within the folder of their archive, the hub's, with names of the writers."""
    if request.param.startswith("hub"):
        columns = {
            "image": [{"bytes": png(ord(name[0])), "path": None} for name, *_ in QUESTIONS],
            "query": [text for _, text, _, _ in QUESTIONS],
            "label": [[answer] for _, _, answer, _ in QUESTIONS],
            "human_or_machine": [
                f"{writer}_test" if request.param == "hub_names" else int(writer == "augmented")
                for *_, writer in QUESTIONS
            ],
        }
        (tmp_path / "data").mkdir()
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "data" / "test-00000-of-00001.parquet")
        return tmp_path
    root = (tmp_path / "ChartQA Dataset" if request.param == "zip" else tmp_path) / "test"
    (root / "png").mkdir(parents=True)
    for name, *_ in QUESTIONS:
        (root / "png" / name).write_bytes(png(ord(name[0])))
    for writer in ("human", "augmented"):
        records = [{"imgname": n, "query": q, "label": a} for n, q, a, w in QUESTIONS if w == writer]
        (root / f"test_{writer}.json").write_text(json.dumps(records))
    return tmp_path


def test_both_layouts_have_the_same_questions(folder):
    source = build("data", f"chartqa(path={str(folder)!r}, split='test', prompt='')")
    examples = list(source.examples())
    asked = [
        (example.messages[0]["content"][1]["text"], example.messages[1]["content"], *example.kinds)
        for example in examples
    ]
    assert asked == [question[1:] for question in QUESTIONS]
    contents = [picture for (picture,) in (example.pictures for example in examples)]
    contents = [picture.read_bytes() if isinstance(picture, pathlib.Path) else picture for picture in contents]
    assert contents == [png(ord(name[0])) for name, *_ in QUESTIONS]
    groups = [example.group for example in examples]
    assert groups[0] == groups[1] and len(set(groups)) == 3
    assert source.notes() == [
        f"read 4 questions of {source.tally.files} file{'s' * (source.tally.files > 1)}: 3 human; 1 augmented"
    ]


def test_questions_of_one_writer(folder):
    spec = f"chartqa(path={str(folder)!r}, split='test', writer='augmented')"
    (example,) = build("data", spec).examples()
    assert example.messages[0]["content"][1]["text"] == "What is C? Answer the question with a single word."


def test_what_is_refused(folder, tmp_path):
    cases = [
        (f"path={str(folder)!r}", "has neither train/train_human.json"),
        (f"path={str(folder)!r}, split='dev'", "split = 'dev': must be one of train, val, test"),
        (f"path={str(folder)!r}, split='test', writer='robot'", "writer = 'robot': must be one of human, augmented"),
        (f"path={str(tmp_path / 'none')!r}", "none': no file matches"),
    ]
    for fields, message in cases:
        with pytest.raises(UserError, match=message):
            list(build("data", f"chartqa({fields})").examples())


def test_a_missing_chart_and_an_empty_answer_are_named(tmp_path):
    root = tmp_path / "train"
    (root / "png").mkdir(parents=True)
    (root / "png" / "a.png").write_bytes(png(1))
    for record, message in [
        ({"imgname": "b.png", "query": "Q", "label": "A"}, "line 1: imgname = 'b.png': there is no file"),
        ({"imgname": "a.png", "query": "Q", "label": " "}, "line 1: field 'label' is empty"),
        ({"imgname": "a.png", "query": "Q"}, "line 1: no field 'label'"),
    ]:
        (root / "train_human.json").write_text(json.dumps([record]))
        with pytest.raises(UserError, match=message):
            list(build("data", f"chartqa(path={str(tmp_path)!r})").examples())
