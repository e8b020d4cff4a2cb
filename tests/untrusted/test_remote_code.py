"""Code that a checkpoint or a data set brings along is never run, and nobody is asked whether it may be."""

import ast
import json
import pathlib

import pytest

import efficientllm
from convert import folders
from efficientllm import convert, data
from efficientllm.errors import UserError
from efficientllm.registry import build
from fuzz import readers

pytestmark = pytest.mark.quick

CODE = "import pathlib\npathlib.Path({marker!r}).touch()\nraise SystemExit('ran')\n"


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that exists once foreign code has run; a question on standard input fails the test."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks whether the code may be run"))
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


def bring_code(folder, marker, names):
    """Adds code and, to each of the JSON files, an auto_map that names it."""
    (folder / "foreign.py").write_text(CODE.format(marker=str(marker)))
    auto = {"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Model"}
    auto |= {"AutoTokenizer": ["foreign.Tokenizer", "foreign.Tokenizer"]}
    for name in names:
        file = folder / name
        config = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(config | {"auto_map": auto}))


@pytest.mark.parametrize("kind", ["known", "foreign"])
def test_a_tokenizers_code(kind, tmp_path, marker):
    readers.tokenizer(tmp_path / "tokenizer")
    bring_code(tmp_path / "tokenizer", marker, ["tokenizer_config.json", "config.json"])
    if kind == "foreign":
        for name, key in (("config.json", "model_type"), ("tokenizer_config.json", "tokenizer_class")):
            file = tmp_path / "tokenizer" / name
            file.write_text(json.dumps(json.loads(file.read_text()) | {key: "Foreign"}))
    try:
        assert data.build_tokenizer(f"hf(path={str(tmp_path / 'tokenizer')!r})", "doc_pairs()").encode("the cat")
    except UserError as error:
        assert "\n" not in str(error)


def test_a_models_code(tmp_path, marker):
    folders.llama(tmp_path / "model")
    bring_code(tmp_path / "model", marker, ["config.json"])
    source = convert.open_source(tmp_path / "model")
    source.bind(source.lm())
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"model_type": "foreign"}))
    with pytest.raises(UserError, match="model_type = 'foreign' is none of"):
        convert.open_source(tmp_path / "model")


def test_a_data_sets_code(tmp_path, marker):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text(CODE.format(marker=str(marker)))
    with pytest.raises(UserError, match="cannot be loaded"):
        list(build("data", f"hf(path={str(tmp_path / 'set')!r})").documents())


def test_every_call_says_that_no_code_is_trusted():
    package = pathlib.Path(efficientllm.__file__).parent
    calls = [
        (file.name, {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords})
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained"
    ]
    assert len(calls) >= 3
    assert [name for name, keywords in calls if keywords.get("trust_remote_code") is not False] == []
