"""What training and evaluation see: whole documents, each once, apart from each other, and resumable."""

import collections
import hashlib
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from efficientllm import data
from efficientllm.data.corpus import Corpus
from efficientllm.data.rows import packing
from efficientllm.errors import UserError

pytestmark = pytest.mark.quick

KEYS = {"tokens": np.int32, "targets": np.int32, "segments": np.int32, "positions": np.int32, "weights": np.float32}


@pytest.fixture
def tokenizer():
    return data.build_tokenizer("bytes", "python_docs()")


@pytest.fixture
def train(spec, tokenizer):
    """Opens training iterators and closes them afterwards."""
    opened = []

    def open_iterator(batch_size=4, length=32, seed=0, **options):
        opened.append(data.train_iterator(spec, tokenizer, batch_size, length, seed, **options))
        return opened[-1]

    yield open_iterator
    for iterator in opened:
        iterator.close()


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def segments(batches):
    """(tokens, targets, positions) of every segment."""
    for batch in batches:
        for row in range(len(batch["tokens"])):
            ids = batch["segments"][row]
            for segment in range(1, ids.max() + 1):
                yield tuple(batch[key][row][ids == segment].tolist() for key in ("tokens", "targets", "positions"))


def pairs(batches):
    """How often each token precedes each target, where the target counts."""
    counted = (np.stack([b["tokens"], b["targets"]], -1)[b["weights"] > 0] for b in batches)
    return collections.Counter(map(tuple, np.concatenate(list(counted)).tolist()))


def same(left, right):
    return all(np.array_equal(a[key], b[key]) for a, b in zip(left, right, strict=True) for key in KEYS)


def split(spec, side):
    return list(Corpus(spec).texts(side))


def test_a_batch_has_the_promised_arrays(train):
    batch = next(train(batch_size=6, length=48))
    assert {key: value.dtype for key, value in batch.items()} == KEYS
    assert all(value.shape == (6, 48) for value in batch.values())
    assert batch["tokens"].min() >= 0 and batch["tokens"].max() < 256


def test_no_segment_leaves_its_document(train, spec, tokenizer):
    documents = [list(text.encode()) for text in split(spec, "train")]
    joined = [bytes(ids).decode() for ids in documents]
    for tokens, targets, positions in segments(take(train(), 50)):
        assert positions == list(range(len(tokens)))
        assert targets[:-1] == tokens[1:]
        text = bytes(tokens).decode()
        if targets[-1] == tokenizer.eos_id:
            assert any(document.endswith(text) for document in joined)
        else:
            assert any(text + chr(targets[-1]) in document for document in joined)


def test_segments_number_each_row_from_one_without_padding(train):
    batches = take(train(), 20)
    numbers = np.concatenate([batch["segments"] for batch in batches])
    assert (numbers[:, 0] == 1).all() and set(np.unique(np.diff(numbers, axis=1))) == {0, 1}
    assert all((batch["weights"] == 1).all() for batch in batches)


def test_every_train_token_is_seen_once_an_epoch_in_a_new_order(tmp_path, tokenizer, monkeypatch):
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": "".join(map(chr, rng.integers(32, 127, 64)))}) for _ in range(40)]
    (tmp_path / "even.jsonl").write_text("\n".join(lines))
    spec = f"jsonl(path={str(tmp_path / 'even.jsonl')!r}, held_out=0.1)"
    train = split(spec, "train")
    monkeypatch.setattr(packing, "SHUFFLED_ROWS", 2 * len(train))  # rows of 32 for documents of 64: an epoch a window
    iterator = data.train_iterator(spec, tokenizer, 2, 32, seed=1)
    epochs = [take(iterator, len(train)) for _ in range(3)]
    iterator.close()
    ids = [[*text.encode(), tokenizer.eos_id] for text in train]
    expected = collections.Counter(pair for document in ids for pair in itertools.pairwise(document))
    assert all(pairs(epoch) == expected for epoch in epochs)
    assert not same(epochs[0], epochs[1]) and not same(epochs[1], epochs[2])


def test_each_epoch_takes_all_documents_in_another_order():
    documents = [{"tokens": np.array([n]), "targets": np.array([n])} for n in range(20)]
    order = [int(document["tokens"][0]) for document in take(packing.endless(documents, 0), 60)]
    epochs = [order[start : start + 20] for start in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_processes_share_the_batch_of_one(train):
    whole = take(train(batch_size=8, seed=3), 10)
    shares = [take(train(batch_size=8, seed=3, process_index=index, process_count=4), 10) for index in range(4)]
    joined = [
        {key: np.concatenate([share[key] for share in step_shares]) for key in KEYS}
        for step_shares in zip(*shares, strict=True)
    ]
    assert same(whole, joined)


def test_the_seed_decides_the_order(train):
    assert same(take(train(seed=5), 8), take(train(seed=5), 8))
    assert not same(take(train(seed=5), 8), take(train(seed=6), 8))


@pytest.mark.parametrize("window, starts", [(16, (0, 1, 3, 4, 5, 63)), (512, (5, 128))])
def test_a_state_through_json_resumes_at_the_same_batch(train, monkeypatch, window, starts):
    monkeypatch.setattr(packing, "SHUFFLED_ROWS", window)
    iterator, states, batches = train(), [], []
    for _ in range(max(starts) + 5):
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
    for start in starts:
        resumed = train()
        take(resumed, 2)
        resumed.set_state(json.loads(states[start]))
        assert same(take(resumed, 5), batches[start : start + 5]), start


def test_an_exact_fit_leaves_no_remainder_and_resumes(tmp_path, tokenizer):
    (tmp_path / "fit.jsonl").write_text("".join(json.dumps({"text": f"{n:032}"}) + "\n" for n in range(30)))
    spec = f"jsonl(path={str(tmp_path / 'fit.jsonl')!r})"
    documents = Corpus(spec).documents(tokenizer)["train"]
    rows = packing.pack(packing.endless(documents, 0), 32)
    iterator = iter(rows)
    for _ in range(5):
        state, resumed = json.dumps(iterator.get_state()), iter(rows)
        expected = next(iterator)["tokens"]
        resumed.set_state(json.loads(state))
        assert np.array_equal(next(resumed)["tokens"], expected)


@pytest.mark.parametrize("batch_size, length, processes", [(4, 32, 1), (4, 32, 2), (3, 50, 3), (64, 16, 4)])
def test_held_out_documents_come_once_and_alike_for_every_process(spec, tokenizer, batch_size, length, processes):
    views = [
        data.eval_batches(spec, tokenizer, batch_size, length, process_index=index, process_count=processes)
        for index in range(processes)
    ]
    batches = [list(view) for view in views]
    assert {len(share) for share in batches} == {len(view) for view in views} and len(views[0]) == len(batches[0])
    assert all(batch["tokens"].shape == (batch_size // processes, length) for share in batches for batch in share)
    ids = [[*text.encode(), tokenizer.eos_id] for text in split(spec, "held_out")]
    expected = collections.Counter(pair for document in ids for pair in itertools.pairwise(document))
    assert pairs(itertools.chain(*batches)) == expected
    assert all(((b["segments"] > 0) == (b["weights"] > 0)).all() for share in batches for b in share)
    assert same(batches[0], list(views[0]))


def test_limit_takes_the_first_batches(spec, tokenizer):
    whole, limited = (data.eval_batches(spec, tokenizer, 2, 32, limit=limit) for limit in (None, 2))
    assert len(limited) == 2 < len(whole)
    assert same(list(limited), list(whole)[:2])


def test_held_out_and_train_are_apart_and_complete(spec, texts):
    train, held_out = split(spec, "train"), split(spec, "held_out")
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(texts)
    assert 0.05 < len(held_out) / len(texts) < 0.4


def test_describe_counts_what_is_there(spec, tokenizer, texts):
    summary = data.describe_data(spec, tokenizer)
    sides = {side: split(spec, side) for side in ("train", "held_out")}
    for side, documents in sides.items():
        size = sum(len(text.encode()) for text in documents)
        assert summary[f"{side}_documents"] == len(documents)
        assert summary[f"{side}_bytes"] == summary[f"{side}_tokens"] == size
    assert summary["source"] == spec and len(summary["fingerprint"]) == 64 and not summary["sampled"]


def test_the_fingerprint_follows_content_and_division(spec, tokenizer, tmp_path):
    first = data.describe_data(spec, tokenizer)["fingerprint"]
    copy = tmp_path / "copy.jsonl"
    copy.write_text((tmp_path / "corpus.jsonl").read_text())
    assert data.describe_data(f"jsonl(path={str(copy)!r}, held_out=0.2)", tokenizer)["fingerprint"] == first
    assert data.describe_data(f"jsonl(path={str(copy)!r}, held_out=0.5)", tokenizer)["fingerprint"] != first
    copy.write_text(copy.read_text().replace("d0w0", "D0w0"))
    assert data.describe_data(f"jsonl(path={str(copy)!r}, held_out=0.2)", tokenizer)["fingerprint"] != first


def test_another_process_with_another_hash_seed_makes_the_same_batches(spec, tmp_path):
    script = (
        "import sys, hashlib, itertools\nfrom efficientllm import data\nspec = sys.argv[1]\n"
        "tokenizer = data.build_tokenizer('bpe(vocab_size=300)', spec)\n"
        "batches = data.train_iterator(spec, tokenizer, 4, 32, 0)\n"
        "found = hashlib.sha256()\n"
        "for batch in itertools.islice(batches, 20):\n"
        "    for key in sorted(batch):\n        found.update(batch[key].tobytes())\n"
        "print(found.hexdigest())\n"
    )
    env = {
        **os.environ,
        "PYTHONHASHSEED": "77",
        "EFFICIENTLLM_CACHE": str(tmp_path / "other"),
        "PYTHONPATH": os.getcwd(),
    }
    run = subprocess.run([sys.executable, "-c", script, spec], env=env, capture_output=True, text=True, check=True)
    tokenizer, digest = data.build_tokenizer("bpe(vocab_size=300)", spec), hashlib.sha256()
    iterator = data.train_iterator(spec, tokenizer, 4, 32, 0)
    for batch in take(iterator, 20):
        for key in sorted(batch):
            digest.update(batch[key].tobytes())
    iterator.close()
    assert run.stdout.strip() == digest.hexdigest()
    assert run.stderr == ""  # nor does an iterator that nobody closed say anything on the way out


def test_a_batch_the_processes_cannot_share_is_refused(spec, tokenizer):
    message = r"train.batch_size = 6: not divisible by the 4 processes; the next that is: 8"
    with pytest.raises(UserError, match=message):
        data.train_iterator(spec, tokenizer, 6, 32, 0, process_count=4)
    with pytest.raises(UserError, match=message):
        data.eval_batches(spec, tokenizer, 6, 32, process_count=4)


def test_a_length_beyond_the_corpus_is_refused(spec, tokenizer):
    with pytest.raises(UserError, match=r"^length = 100000: the train text of .* has only \d+ tokens"):
        data.train_iterator(spec, tokenizer, 4, 100_000, 0)
    with pytest.raises(UserError, match=r"^length = 9000: the held-out text of .* has only \d+ tokens"):
        data.eval_batches(spec, tokenizer, 4, 9000)
