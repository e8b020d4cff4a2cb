"""Data sets of the hub, here folders laid out as one: whole, streamed, resumed, out of reach."""

import json

import numpy as np
import pytest

from efficientllm import data
from efficientllm.data.corpus import Corpus
from efficientllm.data.hub import Hub
from efficientllm.data.streaming import Stream
from efficientllm.errors import UserError

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def arrow_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")


@pytest.fixture
def folder(tmp_path, texts):
    path = tmp_path / "set"
    path.mkdir()
    for shard in range(3):
        rows = [{"text": text, "id": index} for index, text in enumerate(texts) if index % 3 == shard]
        (path / f"part{shard}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def tokenizer():
    return data.build_tokenizer("bytes", "python_docs()")


def take(iterator, count):
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


def first_epoch(corpus, tokenizer, index, count):
    iterator, texts = iter(Stream(corpus, tokenizer, index, count)), []
    while True:
        tokens = next(iterator)["tokens"]
        if iterator.get_state()["epoch"] > 0:
            return texts
        texts.append(tokenizer.decode(tokens))


def test_whole_and_streamed_are_the_same_corpus(folder, tokenizer):
    whole = data.describe_data(f"hf(path={folder!r})", tokenizer)
    streamed = data.describe_data(f"hf(path={folder!r}, streaming=True)", tokenizer)
    assert whole["fingerprint"] == streamed["fingerprint"]
    assert (whole["sampled"], streamed["sampled"]) == (False, True)


def test_a_second_start_reads_no_rows(folder, tokenizer, monkeypatch):
    spec = f"hf(path={folder!r})"
    first = data.describe_data(spec, tokenizer)
    monkeypatch.setattr(Hub, "texts", lambda *_: pytest.fail("read again"))
    assert data.describe_data(spec, tokenizer) == first


def test_a_stream_never_trains_on_held_out_documents(folder, tokenizer, texts):
    corpus = Corpus(f"hf(path={folder!r}, streaming=True, held_out=0.2)")
    held_out = set(corpus.texts("held_out"))
    assert held_out
    assert sorted(first_epoch(corpus, tokenizer, 0, 1)) == sorted(set(texts) - held_out)


@pytest.mark.parametrize("processes", [2, 3])
def test_a_stream_gives_each_process_its_own_documents(folder, tokenizer, processes):
    corpus = Corpus(f"hf(path={folder!r}, streaming=True)")
    shares = [first_epoch(corpus, tokenizer, index, processes) for index in range(processes)]
    assert all(shares)
    assert sorted(sum(shares, [])) == sorted(corpus.texts("train"))


def test_a_stream_resumes_at_the_same_batch(folder, tokenizer, monkeypatch):
    from efficientllm.data.rows import packing

    monkeypatch.setattr(packing, "SHUFFLED_ROWS", 16)
    spec = f"hf(path={folder!r}, streaming=True)"
    iterator, states, batches = data.train_iterator(spec, tokenizer, 4, 32, 0), [], []
    for _ in range(160):  # three epochs
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
    iterator.close()
    assert json.loads(states[-1])["parent_window_start_state"]["parent_state"]["epoch"] >= 2
    for start in (4, 155):
        resumed = data.train_iterator(spec, tokenizer, 4, 32, 0)
        resumed.set_state(json.loads(states[start]))
        for left, right in zip(take(resumed, 5), batches[start : start + 5], strict=True):
            assert all(np.array_equal(left[key], right[key]) for key in left)


def test_a_stream_trains_a_bpe_and_evaluates_on_its_sample(folder):
    spec = f"hf(path={folder!r}, streaming=True, held_out=0.2, sample=40)"
    tokenizer = data.build_tokenizer("bpe(vocab_size=300)", spec)
    summary = data.describe_data(spec, tokenizer)
    assert summary["train_documents"] + summary["held_out_documents"] == 40
    batches = list(data.eval_batches(spec, tokenizer, 2, 16))
    assert sum(batch["weights"].sum() for batch in batches) == summary["held_out_tokens"]


def test_a_stream_without_train_documents_ends_with_a_reason(folder, tokenizer, monkeypatch):
    corpus = Corpus(f"hf(path={folder!r}, streaming=True)")
    monkeypatch.setattr(Corpus, "side", lambda *_: "held_out")
    with pytest.raises(UserError, match="a whole epoch of the stream held no train document"):
        next(iter(Stream(corpus, tokenizer, 0, 1)))


@pytest.mark.parametrize("streaming", [False, True])
def test_out_of_reach_says_how(tokenizer, streaming):
    with pytest.raises(UserError, match=r"hf\(path='nobody/nothing'.* cannot be loaded \(.*Hub.*without a network"):
        data.describe_data(f"hf(path='nobody/nothing', streaming={streaming})", tokenizer)


def test_an_unknown_split_and_field_name_what_there_is(folder, tokenizer):
    with pytest.raises(UserError, match=r"Unknown split \"tset\".*train"):
        data.describe_data(f"hf(path={folder!r}, split='tset')", tokenizer)
    with pytest.raises(UserError, match=r"no field 'txt'; there are: text, id; did you mean 'text'\?"):
        data.describe_data(f"hf(path={folder!r}, field='txt')", tokenizer)


def test_json_nested_too_deep_does_not_reach_the_parser_that_dies_of_it(tmp_path, tokenizer):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "part.jsonl").write_text('{"text": "a"}\n{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    for streaming in (False, True):
        with pytest.raises(UserError, match="part.jsonl, line 2: JSON that is nested too deep"):
            data.describe_data(f"hf(path='{tmp_path}/set', streaming={streaming})", tokenizer)


def test_rows_that_datasets_cannot_read_are_one_line(tmp_path, tokenizer):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "part.parquet").write_text("no parquet at all, just words that go on for a while")
    with pytest.raises(UserError) as error:
        data.describe_data(f"hf(path='{tmp_path}/set', streaming=True)", tokenizer)
    assert "\n" not in str(error.value)


def _pictures(folder, several):
    """Writes a data set of pictures with questions, answers and conversations."""
    import io

    import datasets
    from PIL import Image

    def png(number):
        stream = io.BytesIO()
        Image.fromarray(np.full((8, 9, 3), number, np.uint8)).save(stream, "PNG")
        return {"bytes": stream.getvalue(), "path": None}

    numbers = range(6)
    turns = [
        [
            {"role": "user", "content": f"<image>{'<image>' if several else ''}Q{number}"},
            {"role": "assistant", "content": f"A{number}"},
        ]
        for number in numbers
    ]
    columns = {
        "image": [[png(number), png(100 + number)] if several else png(number) for number in numbers],
        "query": [f"Q{number}" for number in numbers],
        "label": [[f"A{number}", "another"] for number in numbers],
        "turns": turns,
    }
    image = datasets.List(datasets.Image()) if several else datasets.Image()
    kinds = {"query": datasets.Value("string"), "label": datasets.List(datasets.Value("string"))}
    turn = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = datasets.Features({"image": image, **kinds, "turns": datasets.List(turn)})
    folder.mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "train.parquet")
    return str(folder)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("columns", ["prompt='query', response='label'", "messages='turns'"])
def test_conversations_about_pictures(tmp_path, several, columns):
    from efficientllm.vision.conversations import place_pictures
    from efficientllm.vision.processors import load_picture

    path = _pictures(tmp_path / "set", several)
    source = Hub(**eval(f"dict(path={path!r}, image='image', {columns})"))
    assert source.modality == "text and images"
    examples = list(source.examples())
    assert len(examples) == 6
    for number, example in enumerate(examples):
        assert [np.asarray(load_picture(content(), example.name))[0, 0, 0] for content in example.pictures] == [
            number,
            100 + number,
        ][: 1 + several]
        question, answer = place_pictures(example.messages, len(example.pictures), example.name)
        assert [part["type"] for part in question["content"]] == ["image"] * (1 + several) + ["text"]
        assert (question["content"][-1]["text"], answer["content"][0]["text"]) == (f"Q{number}", f"A{number}")
    documents = list(source.documents())
    assert len(documents) == 6 and all("Q" in text for text, _ in documents)


def test_a_missing_column_of_conversations_is_named(tmp_path):
    path = _pictures(tmp_path / "set", False)
    with pytest.raises(UserError, match="no field 'answer'"):
        list(Hub(path=path, image="image", prompt="query", response="answer").examples())
    with pytest.raises(UserError, match="streaming = True"):
        list(Hub(path=path, image="image", prompt="query", response="label", streaming=True).examples())
