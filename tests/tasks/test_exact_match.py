"""`exact_match`: the share of held-out records that greedy decoding would answer word for word."""

import json

import pytest

import runs
from efficientllm import main
from efficientllm.data.corpus import Corpus

pytestmark = pytest.mark.xdist_group("runs")
ANSWERS = ("red", "green and blue")  # of which a model of few steps learns the frequent one


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`(data, folder)` of a run on records of which seven in ten have one answer."""
    where = tmp_path_factory.mktemp("records")
    records = [{"prompt": f"{i}?", "response": ANSWERS[i * i % 10 > 6]} for i in range(400)]
    (where / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    spec = f"pairs(path='{where}/records.jsonl', held_out=0.2)"
    argv = runs.arguments(
        where, where / "run", data=spec, train__steps=60, train__length=40, eval__batches=0, eval__every=0
    )
    assert main.main([*argv, "--config.train.schedule=constant(peak=0.01)", "--config.train.log_every=20"]) == 0
    return spec, where / "run"


def row_of(folder):
    return json.loads((folder / "record.json").read_text())


def serve(trained, workdir, **values):
    spec, folder = trained
    values = {"data": spec, "infer.baseline": "", "eval.batches": 0, "train.length": 40} | values
    values |= {"infer.chat": False, "infer.prompt_length": 8, "infer.max_new_tokens": 20, "infer.repeats": 1}
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    model = f"--config.model.pretrained={folder}"
    assert main.main([f"--config={runs.ROOT}/configs/infer.py:float32", f"--workdir={workdir}", model, *flags]) == 0
    return row_of(workdir)


def test_it_is_what_greedy_decoding_gives(trained, tmp_path):
    records = [json.loads(text) for text in Corpus(trained[0]).texts("held_out")]
    prompts = tuple(question["content"] + "\n\n" for question, _ in records)
    row = serve(trained, tmp_path / "served", **{"infer.prompts": prompts})
    lines = (tmp_path / "served" / "samples" / "generated.jsonl").read_text().splitlines()
    completions = [json.loads(line)["answer"] for line in lines]
    right = [text == answer["content"] for text, (_, answer) in zip(completions, records, strict=True)]
    assert 0 < sum(right) < len(records)
    assert row["quality"]["exact_match"] == sum(right) / len(records)
    assert row_of(trained[1])["quality"]["exact_match"] == row["quality"]["exact_match"]
    parts = row["sources"]["exact_match"]["parts"]
    assert [sum(column) for column in zip(*parts, strict=True)] == [sum(right), len(records)]


def test_text_has_none(trained, tmp_path):
    text = runs.corpus(tmp_path / "texts")
    row = serve(trained, tmp_path / "served", data=f"text(path='{text}/*.txt')", **{"eval.batches": 2})
    assert "exact_match" not in row["quality"]
    entry = row["sources"]["eval_loss"]
    assert len(entry["parts"]) == 2 and entry["standard_error"] > 0
    nats, targets = (sum(column) for column in zip(*entry["parts"], strict=True))
    assert row["quality"]["eval_loss"] == pytest.approx(nats / targets, rel=1e-12)
