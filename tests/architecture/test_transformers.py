"""The decoder against transformers' models of the same shape and weights, in float32: logits, loss and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from efficientllm.architecture import from_config
from efficientllm.ops.attention import Context
from tests.contract import loss_fn
from tiers import slow_case, slow_except

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB, B, T = 96, 2, 80  # long enough for the chunked kernel

FAMILIES = {
    "llama-mha": ("Llama", "mha", {"num_key_value_heads": 4}, {}),
    "llama-mqa": ("Llama", "mqa", {"num_key_value_heads": 1}, {}),
    "llama-gqa": ("Llama", "gqa", {"num_key_value_heads": 2}, {}),
    "qwen2": ("Qwen2", "gqa(qkv_bias=True)", {"num_key_value_heads": 2}, {"tied": True}),
    "qwen3": ("Qwen3", "gqa(qk_norm=True)", {"num_key_value_heads": 2}, {}),
}


def _reference(family, changes, rng, tied):
    torch.manual_seed(int(rng.integers(1 << 30)))
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=int(rng.choice([56, 104])),
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=int(rng.choice([8, 16])),
        rope_parameters={"rope_type": "default", "rope_theta": float(rng.choice([1e4, 5e5]))},
        rms_norm_eps=float(rng.choice([1e-6, 1e-5])),
        tie_word_embeddings=tied,
        attn_implementation="eager",
        **changes,
    )
    reference = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():  # biases and norm scales too: at their initial values they would hide a mistake
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return config, reference


def _ours(config, mixer, tied):
    ours = base.get_config().model
    ours.unroll = 0
    ours.size = (
        f"tiny(num_layers=2, dim=48, num_heads=4, num_kv_heads={config.num_key_value_heads}, "
        f"head_dim={config.head_dim}, hidden={config.intermediate_size}, "
        f"rope_base={config.rope_parameters['rope_theta']}, "
        f"norm_eps={config.rms_norm_eps})"
    )
    ours.mixer, ours.tied = mixer, tied
    return from_config.from_config(ours, VOCAB)


def _params(tensors, qk_norm, bias, tied):
    """Our tree from a transformers state dict, or from its gradients."""

    def layer(i):
        def get(name):
            return tensors[f"model.layers.{i}.{name}"].numpy()

        mixer = {n: {"kernel": get(f"self_attn.{n}_proj.weight").T} for n in "qkvo"}
        if bias:
            for n in "qkv":
                mixer[n]["bias"] = get(f"self_attn.{n}_proj.bias")
        if qk_norm:
            mixer |= {f"{n}_norm": {"scale": get(f"self_attn.{n}_norm.weight")} for n in "qk"}
        return {
            "mixer": mixer,
            "mixer_norm": {"scale": get("input_layernorm.weight")},
            "ffn": {n: {"kernel": get(f"mlp.{n}_proj.weight").T} for n in ("gate", "up", "down")},
            "ffn_norm": {"scale": get("post_attention_layernorm.weight")},
        }

    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), layer(0), layer(1))
    head = {} if tied else {"head": {"kernel": tensors["lm_head.weight"].numpy().T}}
    return {
        "embedding": tensors["model.embed_tokens.weight"].numpy(),
        "groups": {"block_0": stacked},
        "norm": {"scale": tensors["model.norm.weight"].numpy()},
        **head,
    }


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, slow_case(1)])
@pytest.mark.parametrize("name", slow_except(FAMILIES, "llama-gqa", "qwen3"))
def test_logits_loss_and_gradients(name, seed):
    family, mixer, changes, options = FAMILIES[name]
    tied = options.get("tied", False)
    rng = np.random.default_rng(seed)
    config, reference = _reference(family, changes, rng, tied)
    lm = _ours(config, mixer, tied)
    shape = {"qk_norm": "qk_norm" in mixer, "bias": "bias" in mixer, "tied": tied}
    params = _params({k: v.detach() for k, v in reference.state_dict().items()}, **shape)
    ids = rng.integers(0, VOCAB, (B, T + 1))

    theirs = reference(torch.tensor(ids[:, :-1])).logits
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    ours, _, _ = jax.jit(lm.apply)({"params": params}, ids[:, :-1], Context.packed(positions))
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-5, rtol=1e-5)

    loss = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), torch.tensor(ids[:, 1:]).flatten())
    loss.backward()
    batch = {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "positions": positions,
        "segments": np.ones((B, T), np.int32),
        "weights": np.ones((B, T), np.float32),
    }
    (our_loss, _), grads = jax.jit(jax.value_and_grad(lambda p: loss_fn(lm, p, batch, B * T), has_aux=True))(params)
    np.testing.assert_allclose(our_loss, loss.item(), rtol=1e-6)
    expected = _params({k: v.grad for k, v in reference.named_parameters()}, **shape)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), grads, expected)


def test_layernorm_and_gelu_against_torch():
    from efficientllm.registry import build

    x = np.random.default_rng(0).normal(size=(3, 5, 16)).astype(np.float32)
    scale, bias = np.linspace(0.5, 2, 16, dtype=np.float32), np.linspace(-1, 1, 16, dtype=np.float32)
    theirs = torch.nn.functional.layer_norm(torch.tensor(x), (16,), torch.tensor(scale), torch.tensor(bias), 1e-5)
    ours = build("norm", "layernorm(eps=1e-5)").apply({"params": {"scale": scale, "bias": bias}}, x)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)

    gelu = build("ffn", "gelu(hidden=24, precision='float32')")
    params = gelu.init(jax.random.key(0), jnp.asarray(x))["params"]
    up, down = params["up"]["kernel"].value, params["down"]["kernel"].value
    theirs = torch.nn.functional.gelu(torch.tensor(x) @ torch.tensor(np.asarray(up))) @ torch.tensor(np.asarray(down))
    ours, aux = gelu.apply({"params": params}, x)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)
    assert aux == {}
