"""Values of a config.json of another type, or out of all range: one line at once that names the key."""

import json
import os
import time

import pytest

from convert import folders
from efficientllm import convert
from efficientllm.errors import UserError

pytestmark = pytest.mark.quick

LONG = {"rope_type": "longrope", "original_max_position_embeddings": 16, "short_factor": [1.0, 1.1]}
WRONG = [
    *[
        (key, value)
        for key in ("num_hidden_layers", "hidden_size", "vocab_size")
        for value in (10**6 * 50, 2.5, [2], "2", True)
    ],
    ("num_hidden_layers", 10**6),
    ("num_attention_heads", [4, 4]),
    ("num_attention_heads", 10**30),
    ("num_key_value_heads", {"a": 1}),
    ("head_dim", -4),
    ("head_dim", "16"),
    ("intermediate_size", [24]),
    ("vocab_size", 10**12),
    ("max_position_embeddings", 1e9),
    ("rms_norm_eps", "1e-5"),
    ("rms_norm_eps", 1e999),
    ("rope_theta", -1.0),
    ("rope_theta", 1e300),
    ("rope_theta", True),
    ("tie_word_embeddings", "false"),
    ("attention_bias", 1),
    ("attention_bias", []),
    ("hidden_act", ["silu"]),
    ("model_type", []),
    ("model_type", {}),
    ("architectures", 3),
    ("architectures", "LlamaForCausalLM"),
    ("architectures", [[]]),
    ("rope_scaling", {"rope_type": []}),
    ("rope_scaling", {"type": 3, "factor": 2.0}),
    ("rope_scaling", {"rope_type": "yarn", "factor": "4"}),
    ("rope_scaling", {"rope_type": "linear", "factor": 0}),
    ("rope_scaling", {"rope_type": "linear", "factor": 1e400}),
    ("rope_scaling", LONG | {"long_factor": [1.0, 0]}),
    ("rope_scaling", LONG | {"long_factor": 2.0}),
    ("rope_scaling", LONG | {"long_factor": ["1", "2"]}),
    ("rope_scaling", LONG | {"long_factor": [1.0] * 70_000}),
    ("rope_parameters", {"rope_theta": "x"}),
    ("mlp_only_layers", [[]]),
    ("layer_types", 3),
    ("sliding_window", "all"),
    ("unknown_number", 10**30),
]


@pytest.mark.parametrize("key, value", WRONG, ids=lambda value: str(value)[:50])
def test_a_value_of_no_range_is_one_line_at_once(key, value, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(folders.LLAMA | {key: value}))
    started = time.thread_time()
    with pytest.raises(UserError, match=f"config.json: .*{key.partition('_')[0]}") as error:
        convert.open_source(tmp_path, weights=False)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1500
    assert time.thread_time() - started < 2


def test_experts_of_all_layers_are_counted(tmp_path):
    config = folders.LLAMA | {"model_type": "qwen3_moe", "num_hidden_layers": 2000, "num_experts": 10_000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="2000 layers of 10000 experts; at most 262144 in all"):
        convert.open_source(tmp_path, weights=False)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": ' + "9" * 10_000 + "}", "", "{", '{"hidden_size": NaN}', "[]", "\xff"]
)
def test_json_that_cannot_be_read_is_one_line(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="config.json: ") as error:
        convert.open_source(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json", "chat_template.jinja"]
)
def test_a_fifo_where_a_file_is_expected_is_one_line(name, tmp_path):
    folders.llama(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if name.endswith(".index.json"):  # beside a whole file it is not read
        (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: is a FIFO, not a file|{name} is a FIFO"):
        convert.open_source(tmp_path).chat_template()


@pytest.mark.parametrize(
    "name", ["fifo", "fifo.gguf", "/dev/zero", "~nobody-of-that-name/x", "x" * 5000, "a/" + "b" * 300]
)
def test_a_path_that_is_neither_file_nor_folder_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for fifo in ("fifo", "fifo.gguf"):
        os.mkfifo(fifo)
    with pytest.raises(UserError, match=r"config.model.pretrained = ") as error:
        convert.open_source(name)
    assert "\n" not in str(error.value)
