"""Positions against transformers' models and against their formulas in numpy, in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peer
from efficientllm.ops.attention import Mask
from efficientllm.positions.bias import alibi_slopes
from efficientllm.registry import build
from tiers import slow_case, slow_except

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LAYERS = 2
ORIGINAL = 24
SCALINGS = {
    "default": ({}, "none"),
    "linear": ({"factor": 2.5}, "linear(factor=2.5)"),
    "dynamic": ({"factor": 3.0}, f"dynamic(factor=3.0, original_length={ORIGINAL})"),
    "yarn": (
        {"factor": 4.0, "original_max_position_embeddings": ORIGINAL, "beta_fast": 3.0, "beta_slow": 0.5},
        f"yarn(factor=4.0, original_length={ORIGINAL}, beta_fast=3.0, beta_slow=0.5)",
    ),
    "llama3": (
        {
            "factor": 8.0,
            "original_max_position_embeddings": ORIGINAL,
            "low_freq_factor": 0.5,
            "high_freq_factor": 3.0,
        },
        f"llama3(factor=8.0, original_length={ORIGINAL}, low_freq_factor=0.5, high_freq_factor=3.0)",
    ),
}


@pytest.mark.parametrize("kind", slow_except(SCALINGS, "yarn", "llama3"))
def test_rope_scaling(kind):
    """Logits of a Llama within and beyond the original length."""
    theirs, ours = SCALINGS[kind]
    config = transformers.LlamaConfig(
        vocab_size=peer.VOCAB,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=LAYERS,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=ORIGINAL,
        rope_parameters={"rope_type": kind, "rope_theta": 100.0, **theirs},
        rms_norm_eps=1e-5,
        attn_implementation="eager",
    )
    reference = peer.randomise(transformers.LlamaForCausalLM(config), seed=3)
    size = {"num_layers": LAYERS, "dim": 48, "num_heads": 3, "num_kv_heads": 3, "head_dim": 16, "hidden": 40}
    lm = peer.lm(size | {"rope_base": 100.0, "norm_eps": 1e-5}, mixer="gqa", position=f"rope(scaling={ours!r})")
    params = peer.tree(dict(reference.named_parameters()), LAYERS, peer.LLAMA_LAYER, peer.LLAMA_TOP)
    ids = peer.tokens(0, 2 * ORIGINAL)
    for length in (ORIGINAL, 2 * ORIGINAL):
        expected = reference(torch.tensor(ids[:, :length]).long()).logits.detach()
        peer.close(peer.logits(lm, params, ids[:, :length]), expected, 1e-5)


@pytest.mark.parametrize("kind", [slow_case("linear"), "dynamic", "yarn", "llama3"])
@pytest.mark.parametrize("fraction, base", [(0.5, 100.0), slow_case(0.75, 1e4)])
def test_partial_rotation_of_scaled_frequencies(kind, fraction, base):
    """Frequencies and amplitude of the turned part, within and beyond the original length."""
    theirs, ours = SCALINGS[kind]
    parameters = {"rope_type": kind, "rope_theta": base, "partial_rotary_factor": fraction, **theirs}
    config = transformers.LlamaConfig(
        hidden_size=96, num_attention_heads=3, max_position_embeddings=ORIGINAL, rope_parameters=parameters
    )
    init = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind]
    for length in (ORIGINAL // 2, 3 * ORIGINAL):
        frequency, amplitude = init(config, device="cpu", seq_len=length)
        positions = jnp.arange(length)[None]
        frequencies, grown = build("rope_scaling", ours).frequencies(base, int(32 * fraction), positions)
        np.testing.assert_allclose(frequencies, frequency.numpy(), rtol=1e-6)
        assert grown == pytest.approx(amplitude, rel=1e-7)
        head = np.random.default_rng(0).standard_normal((1, length, 2, 32), np.float32)
        rope = build("position", f"rope(base={base}, fraction={fraction}, scaling={ours!r})")
        turned = rope.apply({}, head, positions, method="rotate")
        np.testing.assert_array_equal(turned[..., int(32 * fraction) :], head[..., int(32 * fraction) :])
        angle = torch.arange(length)[:, None] * frequency
        cos, sin = (torch.cat([wave(angle)] * 2, -1)[None] * amplitude for wave in (torch.cos, torch.sin))
        rotate = transformers.models.gpt_neox.modeling_gpt_neox.apply_rotary_pos_emb
        expected, _ = rotate(*[torch.tensor(head)] * 2, cos, sin, unsqueeze_dim=2)
        np.testing.assert_allclose(turned, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("H", [1, 4, 6, 8, 12, 20])
def test_alibi_slopes(H):
    bloom = transformers.models.bloom.modeling_bloom.build_alibi_tensor
    mpt = transformers.models.mpt.modeling_mpt.build_mpt_alibi_tensor
    length = 5
    biases = bloom(torch.ones(1, length), H, torch.float32).view(H, length), mpt(H, length).view(H, length)
    for bias in biases:
        np.testing.assert_allclose(alibi_slopes(H), (bias[:, -1] - bias[:, -2]).numpy(), rtol=1e-6)


BLOOM_TOP = {"embedding": "transformer.word_embeddings.weight"} | peer.named(
    {"embed_norm": "transformer.word_embeddings_layernorm", "norm": "transformer.ln_f"}
)
BLOOM_LAYER = peer.named(
    {
        "mixer_norm": "input_layernorm",
        "mixer/q": "self_attention.query",
        "mixer/k": "self_attention.key",
        "mixer/v": "self_attention.value",
        "mixer/o": "self_attention.dense",
        "ffn_norm": "post_attention_layernorm",
        "ffn/up": "mlp.dense_h_to_4h",
        "ffn/down": "mlp.dense_4h_to_h",
    },
    prefix="transformer.h.{}.",
)
GPT_BLOCK = {"mixer": "mha(qkv_bias=True, o_bias=True)", "ffn": "gelu", "norm": "layernorm(eps=1e-5)", "tied": True}


def test_alibi_in_bloom():
    """The whole model, through the chunked kernel, with heads that are no power of two.

    BLOOM's approximate GELU is exchanged for the exact one.
    """
    H = 6
    config = transformers.BloomConfig(
        vocab_size=peer.VOCAB, hidden_size=8 * H, n_layer=LAYERS, n_head=H, attn_implementation="eager"
    )
    reference = peer.randomise(transformers.BloomForCausalLM(config), seed=H)
    for block in reference.transformer.h:
        block.mlp.gelu_impl = torch.nn.GELU()
    size = {"num_layers": LAYERS, "dim": 8 * H, "num_heads": H, "head_dim": 8, "hidden": 32 * H}
    ours = peer.lm(size, position="alibi", embed_norm=True, **GPT_BLOCK)

    def to_tree(tensors):
        return peer.tree(peer.unfuse(tensors, H), LAYERS, BLOOM_LAYER, BLOOM_TOP)

    peer.check(reference, ours, to_tree, peer.tokens(H, 81), 1e-5)


def _bias(position, H, table, mask, queries, keys):
    """What a position adds to the scores of a range of queries over one of keys."""
    module = build("position", position)
    return module.apply({"params": {"table": table}}, method=lambda self: self.bias(H)(mask, queries, keys))


def _of_decoding(length, keys):
    return Mask(query_index_BT=jnp.arange(length, keys)[None])


@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (8, 20), (16, 64), (12, 100), (32, 1000)])
def test_t5_buckets(num_buckets, max_distance):
    attention = transformers.models.t5.modeling_t5.T5Attention
    distance = np.arange(-3, 1200)
    t5 = build("position", f"t5(num_buckets={num_buckets}, max_distance={max_distance})")
    for order, distances in (("causal", distance), ("bidirectional", np.arange(-1200, 1200))):
        expected = attention._relative_position_bucket(
            torch.tensor(-distances), order == "bidirectional", num_buckets=num_buckets, max_distance=max_distance
        )
        class_of = jax.jit(functools.partial(t5.class_of, order=order))
        np.testing.assert_array_equal(class_of(distances), expected.numpy())
    np.testing.assert_array_equal(t5.class_of(-distance, "prefix"), t5.class_of(abs(distance)))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["causal", "bidirectional"])
def test_t5_bias(order):
    """The bias matrix of T5's decoder and encoder, as training makes it and as decoding looks it up."""
    H, T = 4, 40
    config = transformers.T5Config(
        num_heads=H,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=30,
        is_decoder=order == "causal",
    )
    attention = transformers.models.t5.modeling_t5.T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    peer.randomise(attention, 0)
    expected = attention.compute_bias(T, T).detach().numpy()
    table = attention.relative_attention_bias.weight.detach().numpy().T
    bias = functools.partial(_bias, "t5(num_buckets=16, max_distance=30)", H, table)
    mask, of_decoding = Mask(order=order), _of_decoding(33, T).replace(order=order)
    np.testing.assert_array_equal(bias(mask, (0, T), (0, T)), expected)
    np.testing.assert_array_equal(bias(mask, (24, 40), (10, 40)), expected[:, :, 24:40, 10:40])
    np.testing.assert_array_equal(bias(of_decoding, (0, 7), (0, T)), expected[:, :, 33:])


def test_relative_bias():
    """A look-up in the table of min(distance, max_distance), for keys that a query may read."""
    H, T, most = 3, 20, 6
    table = np.random.default_rng(0).standard_normal((H, most + 1), np.float32)
    expected = np.stack([[[table[h, min(max(t - s, 0), most)] for s in range(T)] for t in range(T)] for h in range(H)])
    bias = functools.partial(_bias, f"relative(max_distance={most})", H, table)
    np.testing.assert_array_equal(bias(Mask(), (0, T), (0, T)), expected[None])
    np.testing.assert_array_equal(bias(Mask(), (5, 9), (2, 9)), expected[None, :, 5:9, 2:9])
    np.testing.assert_array_equal(bias(_of_decoding(15, T), (0, 5), (0, T)), expected[None, :, 15:])


@pytest.mark.parametrize("position", ["alibi", "t5(num_buckets=8, max_distance=20)", "relative(max_distance=6)"])
def test_biases_in_both_directions(position):
    """ALiBi and relative are symmetric, T5 has classes of its own for keys after the query; chunks look them up."""
    H, T, c = 4, 20, 8 if "t5" in position else 7
    table = np.random.default_rng(0).standard_normal((H, c), np.float32)
    bias, mask = functools.partial(_bias, position, H, table), Mask(order="bidirectional")
    whole, causal = (np.broadcast_to(bias(of, (0, T), (0, T))[0], (H, T, T)) for of in (mask, Mask()))
    expected = np.where(np.tril(np.ones((T, T), bool)), causal, causal.swapaxes(1, 2))
    if "t5" in position:
        distance = np.arange(T)[:, None] - np.arange(T)
        expected = table[:, build("position", position).class_of(distance, "bidirectional")]
    np.testing.assert_array_equal(whole, expected)
    of_chunk = mask.replace(query_index_BT=jnp.arange(5, 9)[None])
    np.testing.assert_array_equal(bias(of_chunk, (0, 4), (0, T))[0], whole[:, 5:9])


@pytest.mark.parametrize("D, base", [(16, 1e4), (10, 50.0)])
def test_sinusoidal(D, base):
    """PE(pos, 2i) = sin(pos / base^(2i/D)), PE(pos, 2i + 1) its cosine, added to embeddings times sqrt(D)."""
    rng = np.random.default_rng(0)
    x, positions = rng.standard_normal((2, 7, D), np.float32), rng.integers(0, 100, (2, 7))
    wave = np.zeros((2, 7, D))
    for i in range(D // 2):
        angle = positions / base ** (2 * i / D)
        wave[..., 2 * i], wave[..., 2 * i + 1] = np.sin(angle), np.cos(angle)
    embedded = build("position", f"sinusoidal(wave_base={base})").apply({}, x, jnp.asarray(positions), method="embed")
    np.testing.assert_allclose(embedded, x * np.sqrt(D) + wave, atol=1e-5)


GPT2_TOP = {"embedding": "transformer.wte.weight", "position/table": "transformer.wpe.weight"} | peer.named(
    {"norm": "transformer.ln_f"}
)
_GPT2_NORMS = peer.named({"mixer_norm": "ln_1", "ffn_norm": "ln_2"}, "transformer.h.{}.")
_GPT2_MAPS = peer.named(
    {
        "mixer/q": "attn.query",
        "mixer/k": "attn.key",
        "mixer/v": "attn.value",
        "mixer/o": "attn.c_proj",
        "ffn/up": "mlp.c_fc",
        "ffn/down": "mlp.c_proj",
    },
    prefix="transformer.h.{}.",
)
GPT2_LAYER = _GPT2_NORMS | {path: f"{name}.T" if path.endswith("kernel") else name for path, name in _GPT2_MAPS.items()}


@pytest.mark.slow
def test_learned_in_gpt2():
    H, dim, most = 3, 24, 45
    config = transformers.GPT2Config(
        vocab_size=peer.VOCAB,
        n_positions=most,
        n_embd=dim,
        n_layer=LAYERS,
        n_head=H,
        activation_function="gelu",
        attn_implementation="eager",
    )
    reference = peer.randomise(transformers.GPT2LMHeadModel(config), seed=5)
    size = {"num_layers": LAYERS, "dim": dim, "num_heads": H, "head_dim": dim // H, "hidden": 4 * dim}
    ours = peer.lm(size, position=f"learned(max_length={most})", **GPT_BLOCK)

    def to_tree(tensors):
        apart = {}
        for name, tensor in tensors.items():
            if "c_attn" in name:
                kernels = zip(("query", "key", "value"), tensor.chunk(3, -1), strict=True)
                apart |= {name.replace("c_attn", name_of_part): piece for name_of_part, piece in kernels}
        return peer.tree(tensors | apart, LAYERS, GPT2_LAYER, GPT2_TOP)

    peer.check(reference, ours, to_tree, peer.tokens(1, 41), 1e-5)


COORDINATES_BTA = np.random.default_rng(5).integers(0, 64, (2, 9, 3))
HEADS_BTHK = np.random.default_rng(6).standard_normal((2, 9, 3, 128), np.float32)
# Frequencies of two roundings move angles of 64 by 64 * 2 * 6e-8, twice, and a pair of numbers below 4 by 6 times that.
ROTATION = {"rtol": 1e-5, "atol": 1e-4}


def test_mrope():
    """M-RoPE of Qwen2.5-VL: frequencies go on from section to section, pairs are halves apart."""
    modeling = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    config = transformers.Qwen2_5_VLTextConfig(
        hidden_size=384,
        num_attention_heads=3,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    )
    q_BHTK = torch.from_numpy(HEADS_BTHK).transpose(1, 2)
    coordinates = torch.from_numpy(COORDINATES_BTA).permute(2, 0, 1)
    cos, sin = modeling.Qwen2_5_VLRotaryEmbedding(config)(q_BHTK, coordinates)
    expected = modeling.apply_rotary_pos_emb(q_BHTK, q_BHTK, cos, sin)[0].transpose(1, 2)
    position = build("position", "rope(base=1e6, sections=(16, 24, 24))", parent=None)
    np.testing.assert_allclose(position.rotate(HEADS_BTHK, COORDINATES_BTA), expected.numpy(), **ROTATION)


def test_axial_rotation_of_a_vision_tower():
    """Qwen2-VL's tower: rows and columns have the same frequencies, each in half of the pairs."""
    modeling = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl")
    config = modeling.Qwen2VLVisionConfig(embed_dim=240, num_heads=3)
    x_THK, coordinates_TA = HEADS_BTHK[0, ..., :80], COORDINATES_BTA[0, :, :2]
    cos, sin = modeling.Qwen2VLVisionRotaryEmbedding(config)(torch.zeros(1), torch.from_numpy(coordinates_TA))
    expected = modeling.apply_rotary_pos_emb_vision(torch.from_numpy(x_THK), torch.from_numpy(x_THK), cos, sin)[0]
    position = build("position", "rope(base=10000.0, sections=(20, 20), restart=True)", parent=None)
    np.testing.assert_allclose(position.rotate(x_THK[None], coordinates_TA[None])[0], expected.numpy(), **ROTATION)
