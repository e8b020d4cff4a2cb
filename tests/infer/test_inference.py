"""Inference runs: the row, the samples, and what is refused."""

import json

import pytest

import runs
from convert import folders
from efficientllm import main
from efficientllm.convert.files import stored_form
from efficientllm.report import rows
from efficientllm.runtime import cpuinfo

pytestmark = [pytest.mark.quick, pytest.mark.xdist_group("inference")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    where = tmp_path_factory.mktemp("inference")
    folders.llama(where / "model", vocab_size=300)
    runs.corpus(where / "texts")
    return where


def arguments(base, workdir, form="int8", **overrides):
    values = {
        "model.pretrained": base / "model",
        "tokenizer": "bytes",
        "data": f"text(path='{base}/texts/*.txt')",
        "train.length": 32,
        "eval.batches": 1,
        "infer.chat": False,
        "infer.prompts": ("Hello, world", "Hi"),
        "infer.max_new_tokens": 8,
        "infer.prompt_length": 8,
        "infer.repeats": 2,
    } | {key.replace("__", "."): value for key, value in overrides.items()}
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    return [f"--config={runs.ROOT}/configs/infer.py:{form}", f"--workdir={workdir}", *flags]


def test_a_row_holds_time_bytes_and_quality(base, tmp_path):
    assert main.main(arguments(base, tmp_path / "run")) == 0
    row = json.loads((tmp_path / "run" / "record.json").read_text())
    assert (row["outcome"], row["task"]) == ("ok", "infer")
    physical, study = row["physical"], row["paper"]
    assert physical["ttft_s"] > 0 and physical["tpot_s"] > 0 and physical["tokens_per_s"] > 0
    assert physical["tpot_s_p99"] is None and "needs 1000 samples" in row["sources"]["tpot_s_p99"]["reason"]
    # Generated tokens over whole requests, not over decoding alone.
    assert study["it_tokens_per_s"] < physical["tokens_per_s"]
    assert study["tt_tokens_per_param_s"] is None and study["mcr"] > 1
    assert physical["kv_bytes_per_token"] == 2 * 2 * 2 * 4 * 4  # layers, k and v, KV heads, width, bytes
    assert row["quality"]["perplexity"] > 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples" / "generated.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["Hello, world", "Hi"]


@pytest.mark.parametrize(
    ("flags", "chosen", "reason"),
    [
        ("avx2", "float32", "the CPU reports no instructions for products of bfloat16"),
        ("avx2 avx512f avx512_bf16", "mixed", "the CPU reports avx512_bf16"),
    ],
)
def test_a_row_says_which_precision_auto_was(base, tmp_path, monkeypatch, flags, chosen, reason):
    monkeypatch.setattr(cpuinfo, "FILE", tmp_path / "cpuinfo")
    cpuinfo.FILE.write_text(f"flags : {flags}\n")
    assert main.main(arguments(base, tmp_path / "run")) == 0
    row = json.loads((tmp_path / "run" / "record.json").read_text())
    assert row["config"]["model"]["precision"] == "auto"
    assert row["provenance"]["precision"] == {"chosen": chosen, "reason": reason}
    assert rows.read_row(tmp_path / "run" / "record.json").config["model.precision"] == chosen


def test_weights_that_a_file_holds_rounded_are_said_to_be_so(monkeypatch, base, tmp_path, capsys):
    """Of a GGUF's Q4_1: dequantised for float32, rounded twice for int8; in the log and in the row's sources."""
    monkeypatch.setattr(stored_form, "stored_form", lambda source: "Q4_1")
    assert main.main(arguments(base, tmp_path / "run")) == 0
    row, printed = json.loads((tmp_path / "run" / "record.json").read_text()), capsys.readouterr().out
    twice = "rounded twice: Q4_1 in the file, then int8()"
    for key in ("resident_weight_bytes", "eval_loss", "bits_per_byte"):
        assert row["sources"][key]["source"].endswith(twice)
    assert "against float32 (dequantised from Q4_1)" in row["sources"]["mcr"]["source"]
    assert f"{twice}; config.quant='stored' keeps the file's" in printed
    assert "TTFT" in printed and "TPOT" in printed and "state of a token" in printed


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_calibrated_weights_are_served_and_compared(method, base, tmp_path):
    size = "tiny(num_layers=1, dim=64, num_heads=2, num_kv_heads=1, head_dim=32, hidden=64)"
    rows = []
    for spec in (f"int4(method='{method}')", "int4()"):
        argv = arguments(base, tmp_path / spec, quant=spec, model__pretrained="", model__size=size)
        assert main.main(argv) == 0
        rows.append(json.loads((tmp_path / spec / "record.json").read_text()))
    assert rows[0]["paper"]["mcr"] > 1 and rows[0]["quality"]["eval_loss"] != rows[1]["quality"]["eval_loss"]
    calibrated, nearest = (row["physical"]["resident_weight_bytes"] for row in rows)
    assert calibrated == nearest if method == "gptq" else calibrated > nearest


def test_what_is_done_is_said_before_it_is_done(base, tmp_path, capsys):
    assert main.main(arguments(base, tmp_path / "run")) == 0
    printed = capsys.readouterr().out
    order = [
        printed.index(text) for text in ("as int8() on 1 x cpu", "weights of", "compiling and measuring", "held out")
    ]
    assert order == sorted(order) and "\x1b" not in printed and "\r" not in printed


@pytest.mark.slow
def test_uncompressed_has_a_rate_of_one(base, tmp_path):
    assert main.main(arguments(base, tmp_path / "run", "float32")) == 0
    assert json.loads((tmp_path / "run" / "record.json").read_text())["paper"]["mcr"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"infer__prompts": "('',)"}, "prompt 0 has no tokens"),
        ({"infer__prompts": f"('{'x' * 130}',)"}, "prompt 0 has 130 tokens"),
        ({"infer__prompts": "/nowhere.txt"}, "cannot be read"),
        ({"infer__sampler": "gredy"}, "did you mean 'greedy'"),
        ({"quant": "int3"}, "no quant of that name"),
        ({"infer__rules": "(('mixer/', 'int5'),)"}, "no quant of that name"),
        ({"infer__rules": "(('norm', 'int8'),)"}, "matches no kernel or table"),
        ({"infer__rules": "('mixer/',)"}, "must be pairs of (regex, spec)"),
        ({"model__kv_cache": "int7"}, "none of activation, bfloat16, float16, int8"),
        ({"infer__chat": True}, "the tokenizer has no chat template"),
        ({"mesh": "sequence=2"}, "'sequence' cannot divide"),
        ({"mesh": "data=2"}, "take a multiple of 2"),
        ({"mesh": "tensor=16"}, "there are 8"),
        ({"mesh": "data=-1,tensr=1"}, "did you mean 'tensor'"),
        ({"quality__results": "/nowhere.json"}, "cannot be read"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_input_is_one_line_and_status_2(overrides, message, base, tmp_path, capsys):
    assert main.main(arguments(base, tmp_path / "run", **overrides)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
