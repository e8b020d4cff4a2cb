"""Fixtures of data tests: a cache folder per test, and a small corpus of distinguishable documents."""

import json
import random

import pytest


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFICIENTLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def texts():
    """Documents of odd lengths, in which no word occurs twice."""
    rng = random.Random(0)
    return [" ".join(f"d{doc}w{word}" for word in range(rng.randint(1, 40))) for doc in range(60)]


@pytest.fixture
def spec(tmp_path, texts):
    """The corpus as a data spec."""
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": index}) + "\n" for index, text in enumerate(texts)))
    return f"jsonl(path={str(path)!r}, held_out=0.2)"
