"""Fuzz targets: every reader of foreign files, with a valid sample and its mutations.

A reader has `make(folder)`, which writes the sample and gives what `spoil` needs; `spoil(rng, sample, folder)`, which
writes a spoiled one; and `read(folder)`, which may raise UserError and nothing else.
"""

import bz2
import functools
import gzip
import importlib
import json
import lzma
import pathlib
import shutil
import struct
import typing
import unittest.mock

import numpy as np
from safetensors.numpy import load_file, save_file

from autoencoders import folders as autoencoder_folders
from autoencoders import wan_folders
from convert import folders
from efficientllm.errors import UserError

from . import mutate


class Reader(typing.NamedTuple):
    make: typing.Callable
    spoil: typing.Callable
    read: typing.Callable


def bytes_of(folder):
    """`{name: bytes}` of a folder's files."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def write(folder, files):
    """Makes the folder hold these files alone."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def spoil_files(names, within=None):
    """A `spoil` for samples that are `{name: bytes}`: of one file of `names` its JSON, its bytes, or its kind."""

    def spoil(rng, sample, folder):
        write(folder, sample)
        name = rng.choice([name for name in names if name in sample])
        if rng.random() < 0.03:
            return f"{name} is {mutate.kind_of_file(rng, folder / name)}"
        data = sample[name]
        if name.endswith((".json", ".jsonl")) and rng.random() < 0.85:
            lines = data.splitlines() if name.endswith(".jsonl") else [data]
            at = rng.randrange(len(lines))
            lines[at] = mutate.text(rng, json.loads(lines[at]))
            data = b"\n".join(lines)
        else:
            data = mutate.data_of(rng, data, within=within)
        (folder / name).write_bytes(data)
        return f"{name} is {data[:2000]!r}"

    return spoil


# Descriptions of models.
ROPES = [
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0},
    {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16, "low_freq_factor": 1.0}
    | {"high_freq_factor": 4.0},
    {"type": "linear", "factor": 2.0},
    {"rope_type": "longrope", "original_max_position_embeddings": 16, "short_factor": [1.0, 1.1], "factor": 2.0}
    | {"long_factor": [1.0, 2.0]},
]
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_experts": 4, "decoder_sparse_step": 1}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}
LATENT |= {"n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
STATE = {"hidden_size": 48, "state_size": 8, "expand": 2, "num_hidden_layers": 2, "vocab_size": 40, "conv_kernel": 4}
FAMILIES = [
    *[folders.LLAMA | {"rope_scaling": rope} for rope in ROPES],
    *[{"model_type": kind} for kind in ("mistral", "gpt_neox", "phi3")],
    {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    {"model_type": "qwen3", "layer_types": ["full_attention", "full_attention"], "head_dim": 16},
    {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    {"model_type": "qwen3_moe", "mlp_only_layers": [0], "norm_topk_prob": True} | EXPERTS,
    {"model_type": "deepseek_v3", "routed_scaling_factor": 2.5} | LATENT | EXPERTS,
    STATE | {"model_type": "mamba", "time_step_rank": 5, "num_hidden_layers": 4},
    STATE | {"model_type": "mamba2", "head_dim": 16, "num_heads": 6, "n_groups": 2, "time_step_limit": [0.0, 1e400]},
    {"_class_name": "DiTTransformer2DModel", "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2}
    | {"in_channels": 4, "out_channels": 8, "sample_size": 8, "num_embeds_ada_norm": 10, "norm_eps": 1e-5},
    {"model_type": "clip_text_model", "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2}
    | {"vocab_size": 40, "projection_dim": 8, "architectures": ["CLIPTextModelWithProjection"], "eos_token_id": 2},
    {"model_type": "umt5", "hidden_size": 24, "d_model": 24, "d_kv": 6, "num_heads": 3, "num_layers": 2}
    | {"vocab_size": 40, "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 8},
    {"_class_name": "DiT", "hidden_size": 24, "depth": 2, "num_heads": 2, "input_size": 8, "mlp_ratio": 4.0},
]


def configs(folder):
    plain = {key: value for key, value in folders.LLAMA.items() if key != "architectures"}
    return [plain | config if "model_type" in config and "hidden_size" not in config else config for config in FAMILIES]


def spoil_config(rng, sample, folder):
    write(folder, {"config.json": mutate.text(rng, rng.choice(sample), 3)})
    return f"config.json is {(folder / 'config.json').read_bytes()[:3000]!r}"


def read_config(folder):
    source = _convert().open_source(folder, weights=False)
    source.lm()


def _convert():
    from efficientllm import convert

    return convert


# Tensors.
def weights(folder):
    folders.llama(folder, num_hidden_layers=1)
    return bytes_of(folder)


def sharded(folder):
    tensors = folders.llama(folder, num_hidden_layers=1)
    (folder / "model.safetensors").unlink()
    names, files = sorted(tensors), {}
    for i, shard in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in shard}, folder / f"part-{i}.safetensors")
        files |= dict.fromkeys(shard, f"part-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return bytes_of(folder)


def spoil_safetensors(rng, sample, folder):
    name = rng.choice([name for name in sample if not name.startswith("config")])
    if not name.endswith(".safetensors") or rng.random() < 0.4:
        return spoil_files([name], within=2000)(rng, sample, folder)
    data = sample[name]
    length = struct.unpack("<Q", data[:8])[0]
    header = mutate.text(rng, json.loads(data[8 : 8 + length]))
    size = len(header) if rng.random() < 0.95 else rng.choice(mutate.WORDS)
    write(folder, sample | {name: struct.pack("<Q", size) + header + data[8 + length :]})
    return f"the header of {name} is {header[:3000]!r}"


def read_weights(folder):
    source = _convert().open_source(folder)
    _load(source)


def _load(source, stored=False):
    import flax.linen as nn

    from efficientllm import model

    lm = source.lm(scan=False)
    source.bind(lm)
    for name in source.tensors.shapes:
        np.asarray(source.tensors.read(name))
    if stored:
        source.load_stored(nn.unbox(model.abstract_params(lm)), lm)


def autoencoder(folder):
    autoencoder_folders.save(folder)
    return bytes_of(folder)


def spoil_autoencoder(rng, sample, folder):
    if rng.random() < 0.6:
        return spoil_files(["config.json"])(rng, sample, folder)
    return spoil_safetensors(rng, sample, folder)


def read_autoencoder(folder):
    from efficientllm.registry import build

    build("autoencoder", f"kl(path={str(folder)!r})").load_params()


def autoencoder_of_clips(folder):
    wan_folders.save(folder)
    return bytes_of(folder)


def read_autoencoder_of_clips(folder):
    from efficientllm.registry import build

    build("autoencoder", f"wan(path={str(folder)!r})").load_params()


def clips(folder):
    from efficientllm.infer.clips import write_clip

    folder.mkdir(exist_ok=True)
    frames = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    for ending in ("webp", "mp4"):
        write_clip(folder / f"clip.{ending}", frames, 10)
    first, *rest = map(importlib.import_module("PIL.Image").fromarray, frames)
    first.save(folder / "clip.gif", save_all=True, append_images=rest, duration=[50, 100, 50, 50])
    return bytes_of(folder)


def read_clips(folder):
    from efficientllm.data.images import clips

    for file in folder.iterdir():
        # A spoiled header may well ask for what is allowed: less is allowed here.
        with unittest.mock.patch.object(clips, "MOST_BYTES", 1 << 27):
            assert clips.read_clip(file).frames.ndim == 4


def gguf(folder):
    from convert.files import test_gguf_file

    package = importlib.import_module("gguf")
    folder.mkdir(exist_ok=True)
    test_gguf_file.write(folder / "m.gguf", kind=package.GGMLQuantizationType.Q8_0, further=_vocabulary)
    return bytes_of(folder)


def _vocabulary(writer):
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|end|>", *"abc", "ab"])
    writer.add_token_types([3, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_rope_scaling_factor(2.0)
    writer.add_chat_template("{{ messages }}")


def read_gguf(folder):
    source = _convert().open_source(folder / "m.gguf")
    source.chat_template()
    _load(source)


# Weights that are compressed.
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}


def rounded(folder):
    import tempfile

    from efficientllm.convert import write_quantized

    with tempfile.TemporaryDirectory() as plain:
        folders.llama(pathlib.Path(plain), **SHAPE)
        write_quantized.convert_quantized(_convert().open_source(plain), "int4(symmetric=False)", folder)
    return bytes_of(folder)


def gptq(folder):
    from convert.files import test_quantized

    _, config = test_quantized.WRITERS["gptq"](folder, folders.llama(folder, **SHAPE))
    (folder / "config.json").write_text(json.dumps(folders.LLAMA | SHAPE | {"quantization_config": config}))
    return bytes_of(folder)


def spoil_arrays(rng, sample, folder):
    """One array of another shape, dtype or numbers; or the files as bytes and JSON."""
    if rng.random() < 0.4:
        names = ["config.json", "model.safetensors"]
        return spoil_files(names, within=3000)(rng, sample, folder)
    write(folder, sample)
    tensors = load_file(folder / "model.safetensors")
    name = rng.choice([name for name in tensors if tensors[name].ndim > 1])
    value = tensors[name]
    shape = list(value.shape)
    at = rng.randrange(len(shape))
    shape[at] = rng.choice([0, 1, 2, shape[at] - 1, shape[at] + 1, shape[at] * 2, shape[at] // 2])
    dtype = rng.choice([value.dtype, value.dtype, np.float16, np.float32, np.int8, np.uint8, np.int32])
    if rng.random() < 0.3:
        shape = rng.choice([[value.size], [1, *shape], shape[::-1]])
    with np.errstate(all="ignore"):
        tensors[name] = np.resize(value, shape).astype(dtype)
    if tensors[name].dtype.kind == "f" and rng.random() < 0.3:
        tensors[name].flat[:1] = rng.choice([np.nan, np.inf, -np.inf])
    save_file(tensors, folder / "model.safetensors")
    return f"{name} is {np.dtype(dtype)} {shape}"


def read_stored(folder):
    with np.errstate(all="ignore"):
        _load(_convert().open_source(folder), stored=True)


# Tokenizers and templates.
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}{{ eos_token }}"


def tokenizer(folder):
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<pad>", "<eos>"], show_progress=False)
    backend.train_from_iterator(["the cat sat on the mat"] * 3, trainer)
    saved = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    saved.chat_template = TEMPLATE
    saved.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 0], "temperature": 0.6}))
    (folder / "config.json").write_text(json.dumps(folders.LLAMA))
    return bytes_of(folder)


def read_tokenizer(folder):
    from efficientllm.registry import build

    tokenizer = build("tokenizer", f"hf(path={str(folder)!r})").fit(None)
    tokenizer.decode(tokenizer.encode("the cat \u00e9"))
    if tokenizer.chat is not None:
        tokenizer.chat([{"role": "user", "content": "hi"}])


PIECES = [
    *("{{ messages }}", "{% for m in messages %}", "{% endfor %}", "{% if true %}", "{% else %}", "{% endif %}"),
    *("{{ 1 / 0 }}", "{{ 'a' * 10**10 }}", "{{ 10**10**7 }}", "{{ range(10**9) | list }}", "{{ range(99999) | sum }}"),
    *(
        "{% macro f(x) %}",
        "{% endmacro %}",
        "{{ f(1) }}",
        "{% set x = ",
        " %}",
        "{{ x.__class__ }}",
        "{% include 'x' %}",
    ),
    *("{% extends 'x' %}", "{% import 'x' as y %}", "{{ raise_exception(1) }}", "{{ strftime_now('%c' * 99) }}", "{#"),
    *("{{ messages | tojson(indent=10**9) }}", "{{ '%999999999d' % 1 }}", "{{ ''.join(messages) }}", "{% break %}"),
    *(
        "{% generation %}",
        "{% endgeneration %}",
        "{{ messages[0]['content'] | center(10**9) }}",
        "{{ self }}",
        "\n",
        "{{",
    ),
    *(
        "{{ loop.index }}",
        "{{ namespace(a=1).a }}",
        "{{ dict(a=1) }}",
        "{{ joiner() }}",
        "{{ lipsum(9) | length }}",
        "}}",
    ),
    *("{{ messages[0].role.format(messages) }}", "{{ messages | groupby('role') }}", "{{ cycler('a').next() }}", "-%}"),
    *(
        "{% call f() %}",
        "{% endcall %}",
        "{% filter upper %}",
        "{% endfilter %}",
        "{{ undefined.x }}",
        "(" * 200,
        "\ud83d",
    ),
]


def template(folder):
    return bytes_of(folder) if folder.exists() and any(folder.iterdir()) else tokenizer(folder)


def spoil_template(rng, sample, folder):
    pieces = [rng.choice(PIECES) for _ in range(rng.randint(1, 6))]
    pieces.insert(rng.randrange(len(pieces)), TEMPLATE)
    text = "".join(pieces).encode("utf-8", "replace")
    if rng.random() < 0.2:
        text = mutate.data_of(rng, text)
    write(folder, sample | {"chat_template.jinja": text})
    return f"chat_template.jinja is {text!r}"


def read_template(folder):
    source = folder / "chat_template.jinja"
    try:
        text = source.read_bytes().decode()
    except UnicodeDecodeError:
        text = source.read_bytes().decode("latin-1")
    chat_of(_loaded(str(folder)), text)


@functools.lru_cache(maxsize=1)
def _loaded(folder):
    import transformers

    # Of the sample: what is spoiled is the template alone.
    return transformers.PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", eos_token="<eos>")


def chat_of(loaded, text):
    for module in ("hf_tokenizer", "tokenizers"):
        try:
            module_of_data = importlib.import_module(f"efficientllm.data.{module}")
        except ImportError:
            continue
        if hasattr(module_of_data, "from_transformers"):
            loaded.chat_template = text
            chat = module_of_data.from_transformers(loaded).chat
            return chat and chat([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "\u00e9"}])
    raise LookupError("no from_transformers")


# Adapters.
def adapter(folder):
    weights(folder.with_name("base"))
    shapes = {f"model.layers.0.self_attn.{name}_proj.weight": size for name, size in (("q", (16, 16)), ("v", (8, 16)))}
    folders.adapter(folder, shapes, 4)
    file = folder / "adapter_config.json"
    further = {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"layers.0.*v_proj": 2.0}, "lora_dropout": 0.1}
    further |= {"target_modules": ["q_proj", "v_proj"], "bias": "none", "use_dora": False, "init_lora_weights": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | further))
    return bytes_of(folder)


def spoil_adapter(rng, sample, folder):
    if rng.random() < 0.7:
        return spoil_files(["adapter_config.json"])(rng, sample, folder)
    rest = {name: data for name, data in sample.items() if name.endswith(".safetensors")}
    change = spoil_safetensors(rng, rest, folder)
    (folder / "adapter_config.json").write_bytes(sample["adapter_config.json"])
    return change


def read_adapter(folder):
    from efficientllm.convert import peft as adapters
    from efficientllm.convert.peft.merged_weight import merge_adapter
    from efficientllm.registry import build

    tensors, base = _base(str(folder.with_name("base")))
    build("adapter", adapters.read_spec(folder))
    opened = importlib.import_module("efficientllm.convert.peft.read").Adapter(folder, tensors)
    with np.errstate(all="ignore"):
        for module in opened.modules:
            kernel = merge_adapter(opened, module, np.asarray(base.tensors.read(f"{module}.weight"), np.float32))
            if not np.isfinite(kernel).all():
                raise ValueError(f"NaN or infinity out of merging {module}")


@functools.lru_cache(maxsize=2)
def _base(folder):
    from efficientllm.convert.hf_config import families
    from efficientllm.convert.tensors import parameter_map

    base = _convert().open_source(folder)
    bound = parameter_map.bind_parameters(base.lm(), families.FAMILIES[base.config["model_type"]].table)
    return {name: tensor for name, tensor in parameter_map.disk_tensors(bound).items() if "proj" in name}, base


# Rows and event files.
def record(folder):
    from report import made

    made.row(folder, al_s=0.5, eval_loss=2.0, aec_w=30.0, sweep={"name": "a", "variant": "b", "block": 0, "order": 1})
    return bytes_of(folder)


def read_record(folder):
    from efficientllm.report import find_rows, rows

    rows.read_rows(find_rows.find_files([folder])[0])


def rows_of_file(folder):
    from efficientllm.record import rows_file

    record(folder / "out" / "a")
    rows_file.pack_rows(folder / "out", folder / "x.rows.jsonl")
    rows_file.pack_rows(folder / "out", folder / "y.rows.jsonl.gz")
    shutil.rmtree(folder / "out")
    return bytes_of(folder)


def read_rows_of_file(folder):
    from efficientllm.record import rows_file
    from efficientllm.report import find_rows, grid_searches

    grid_searches.read_grids([folder])
    for file in sorted(folder.iterdir()):
        find_rows.collect_rows([file])
        rows_file.read_rows_file(file)


def events(folder):
    from report import made

    made.row(folder, al_s=0.5)
    made.curves(folder, 20)
    return bytes_of(folder)


def spoil_events(rng, sample, folder):
    return spoil_files([name for name in sample if name.startswith("events")])(rng, sample, folder)


def read_events(folder):
    from efficientllm.report import curves, rows

    curves.read_curves(rows.read_row(folder / "record.json"))


def results(folder):
    folder.mkdir(exist_ok=True)
    contents = {
        "results": {"a": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "a"}},
        "n-samples": {"a": {"effective": 9}},
    }
    (folder / "results.json").write_text(json.dumps(contents | {"groups": {}, "lm_eval_version": "0.4"}))
    return bytes_of(folder)


def read_results(folder):
    from efficientllm.evaluation import lm_eval_tasks

    for reading in lm_eval_tasks.readings_of_file(str(folder / "results.json")).values():
        json.dumps(reading.value, allow_nan=False)


# Data.
def lines(folder, rows, name="data.jsonl"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return bytes_of(folder)


def documents(folder):
    return lines(folder, [{"text": f"a document {i}", "n": i} for i in range(5)])


def conversations(folder):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "\u00e9 yes"}]
    return lines(folder, [{"messages": turns}] * 3)


def table(folder):
    pyarrow = importlib.import_module("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    folder.mkdir(exist_ok=True)
    rows = pyarrow.table({"text": [f"a document {i}" for i in range(50)], "n": list(range(50))})
    parquet.write_table(rows, folder / "data.parquet")
    return bytes_of(folder)


def packed(folder):
    folder.mkdir(exist_ok=True)
    text = "\n".join(json.dumps({"text": f"a document {i}"}) for i in range(50))
    (folder / "data.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    return bytes_of(folder)


def array(folder):
    """Alpaca's layout, as it is published."""
    folder.mkdir(exist_ok=True)
    rows = [{"instruction": "add", "input": f"1 and {i}", "output": f"{i + 1}"} for i in range(4)]
    (folder / "data.json").write_text(json.dumps(rows, indent=1))
    return bytes_of(folder)


def separated(ending, by):
    def make(folder):
        folder.mkdir(exist_ok=True)
        rows = ["prompt,text,response".replace(",", by)] + [
            f'{i}{by}"a ""word"", and\n{i}"{by}\u00e9' for i in range(9)
        ]
        (folder / f"data.{ending}").write_text("\n".join(rows))
        return bytes_of(folder)

    return make


def compressed(ending):
    def make(folder):
        pyarrow = importlib.import_module("pyarrow")
        folder.mkdir(exist_ok=True)
        text = "\n".join(json.dumps({"text": f"a document {i}"}) for i in range(50)).encode()
        pack = {"xz": lzma.compress, "bz2": bz2.compress}.get(ending)
        packed = pack(text) if pack else pyarrow.Codec("zstd").compress(text).to_pybytes()
        (folder / f"data.jsonl.{ending}").write_bytes(packed)
        return bytes_of(folder)

    return make


def plain(folder):
    folder.mkdir(exist_ok=True)
    (folder / "data.txt").write_text("one line\nanother \u00e9\n" * 20)
    return bytes_of(folder)


def read_data(spec):
    def read(folder):
        from efficientllm.registry import build

        for document in build("data", spec.format(folder)).documents():
            (document if isinstance(document, str) else document[0]).encode()

    return read


def prompts(folder):
    return lines(folder, [{"prompt": "hello"}, {"prompt": "\u00e9"}], "prompts.jsonl")


def read_prompts(folder):
    from efficientllm.infer import prompts

    for text in prompts.read((str(folder / "prompts.jsonl"),)):
        text.encode()


READERS = {
    "config": Reader(configs, spoil_config, read_config),
    "safetensors": Reader(weights, spoil_safetensors, read_weights),
    "index": Reader(sharded, spoil_safetensors, read_weights),
    "autoencoder": Reader(autoencoder, spoil_autoencoder, read_autoencoder),
    "autoencoder_of_clips": Reader(autoencoder_of_clips, spoil_autoencoder, read_autoencoder_of_clips),
    "clips": Reader(clips, spoil_files(["clip.webp", "clip.gif", "clip.mp4"]), read_clips),
    "gguf": Reader(gguf, spoil_files(["m.gguf"], within=4000), read_gguf),
    "rounded": Reader(rounded, spoil_arrays, read_stored),
    "gptq": Reader(gptq, spoil_arrays, read_stored),
    "tokenizer": Reader(
        tokenizer,
        spoil_files(["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"]),
        read_tokenizer,
    ),
    "template": Reader(template, spoil_template, read_template),
    "adapter": Reader(adapter, spoil_adapter, read_adapter),
    "record": Reader(record, spoil_files(["record.json"]), read_record),
    "rows": Reader(rows_of_file, spoil_files(["x.rows.jsonl", "y.rows.jsonl.gz"]), read_rows_of_file),
    "events": Reader(events, spoil_events, read_events),
    "results": Reader(results, spoil_files(["results.json"]), read_results),
    "jsonl": Reader(documents, spoil_files(["data.jsonl"]), read_data("jsonl(path='{}/*')")),
    "gzip": Reader(packed, spoil_files(["data.jsonl.gz"]), read_data("jsonl(path='{}/*')")),
    "parquet": Reader(table, spoil_files(["data.parquet"]), read_data("parquet(path='{}/*')")),
    "array": Reader(array, spoil_files(["data.json"]), read_data("pairs(path='{}/*')")),
    "csv": Reader(separated("csv", ","), spoil_files(["data.csv"]), read_data("csv(path='{}/*')")),
    "tsv": Reader(separated("tsv", "\t"), spoil_files(["data.tsv"]), read_data("pairs(path='{}/*')")),
    **{
        ending: Reader(compressed(ending), spoil_files([f"data.jsonl.{ending}"]), read_data("jsonl(path='{}/*')"))
        for ending in ("zst", "xz", "bz2")
    },
    "text": Reader(plain, spoil_files(["data.txt"]), read_data("text(path='{}/*')")),
    "chat": Reader(conversations, spoil_files(["data.jsonl"]), read_data("chat(path='{}/*')")),
    "prompts": Reader(prompts, spoil_files(["prompts.jsonl"]), read_prompts),
}
EXPECTED = UserError
