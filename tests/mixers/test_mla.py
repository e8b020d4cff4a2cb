"""Latent attention against transformers' DeepSeek-V2 and V3 with dense layers, and its absorbed decoding."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

import contract
import hlo
import peer
from contract import orders
from efficientllm import model
from efficientllm.ops.attention import Context
from tiers import slow_case

transformers = pytest.importorskip("transformers")

H, LAYERS = 5, 2
YARN = "yarn(factor={factor}, original_length={length}, beta_fast=4.0, mscale={mscale}, mscale_all_dim={all_dim})"


def pair(family, scaled, queries_low, seed):
    """A random reference, ours of its shape, and the function from its tensors to ours."""
    rng = np.random.default_rng(seed)
    R, N, P, V, hidden = (int(rng.choice(sizes)) for sizes in ((20, 28), (12, 16), (6, 8), (10, 14), (36, 56)))
    q_rank = int(rng.choice([12, 24])) if queries_low else None
    base, eps = float(rng.choice([100.0, 1e4])), float(rng.choice([1e-6, 1e-3]))
    rope, spec = {"rope_type": "default", "rope_theta": base}, "none"
    if scaled:
        factor, length = float(rng.choice([2.5, 8.0])), int(rng.choice([16, 64]))
        mscale, all_dim = ((0.7, 1.3), (0.707, 0.707), (0.0, 0.0), (0.0, 1.0))[seed % 4]
        rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
        rope |= {"beta_fast": 4.0, "beta_slow": 1.0, "mscale": mscale, "mscale_all_dim": all_dim}
        spec = YARN.format(factor=factor, length=length, mscale=mscale, all_dim=all_dim)
    config = getattr(transformers, f"Deepseek{family}Config")(
        vocab_size=peer.VOCAB,
        hidden_size=40,
        intermediate_size=hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=H,
        num_key_value_heads=H,
        q_lora_rank=q_rank,
        kv_lora_rank=R,
        qk_nope_head_dim=N,
        qk_rope_head_dim=P,
        v_head_dim=V,
        rope_parameters=rope,
        rms_norm_eps=eps,
        first_k_dense_replace=LAYERS,
        max_position_embeddings=512,
        attn_implementation="eager",
    )
    reference = peer.randomise(getattr(transformers, f"Deepseek{family}ForCausalLM")(config), seed)
    size = {"num_layers": LAYERS, "dim": 40, "num_heads": H, "head_dim": N, "hidden": hidden, "norm_eps": eps}
    ours = peer.lm(
        size | {"rope_base": base},
        mixer=f"mla(kv_rank={R}, rope_dim={P}, v_dim={V}" + (f", q_rank={q_rank})" if q_rank else ")"),
        position=f'rope(interleaved=True, scaling="{spec}")',
    )
    layer = peer.llama_layer(_names(q_rank))
    to_tree = functools.partial(peer.tree, num_layers=LAYERS, layer=layer, top=peer.LLAMA_TOP)
    return reference, ours, to_tree, (R, N, P, V)


def _names(q_rank):
    names = {"kv_a/kernel": "kv_a_proj_with_mqa.weight", "kv_norm/scale": "kv_a_layernorm.weight"}
    names |= {"kv_b/kernel": "kv_b_proj.weight", "o/kernel": "o_proj.weight"}
    if q_rank is None:
        return names | {"q/kernel": "q_proj.weight"}
    return names | {
        "q_a/kernel": "q_a_proj.weight",
        "q_norm/scale": "q_a_layernorm.weight",
        "q_b/kernel": "q_b_proj.weight",
    }


@pytest.mark.parametrize(
    "family, scaled, queries_low, seed",
    [
        slow_case("V2", False, False, 0),
        ("V2", True, True, 1),
        slow_case("V3", False, True, 0),
        slow_case("V3", True, False, 2),
        slow_case("V3", True, True, 3),
    ],
)
def test_logits_loss_and_gradients(family, scaled, queries_low, seed):
    reference, ours, to_tree, _ = pair(family, scaled, queries_low, seed)
    peer.check(reference, ours, to_tree, peer.tokens(seed, 41), 1e-5)


@pytest.mark.parametrize("family, seed", [("V2", 4), ("V3", 0)])
def test_absorbed_decode(family, seed):
    """One token at a time from an empty state gives the reference's logits, on R + P numbers a token and layer."""
    reference, ours, to_tree, (R, _, P, _) = pair(family, True, True, seed)
    params = to_tree(dict(reference.named_parameters()))
    ids, T = peer.tokens(seed, 29), 29
    expected = reference(peer.torch.tensor(ids).long()).logits.detach().numpy()
    states = model.init_states(ours, peer.B, T)
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(states))
    assert state_bytes == peer.B * T * LAYERS * (R + P) * 4

    @jax.jit
    def step(states, token_B1, positions_B1):
        return ours.apply({"params": params}, token_B1, Context.decoding(positions_B1), states)[:2]

    for t in range(T):
        logits, states = step(states, ids[:, t : t + 1], np.full((peer.B, 1), t, np.int32))
        peer.close(logits[:, 0], expected[:, t], 1e-5)


@pytest.mark.parametrize("new_tokens", [1, 2])
def test_decode_expands_no_latent(new_tokens):
    """With one new token no array has a key or value a slot and head; with two, the expanded form, one has."""
    _, ours, _, (R, N, P, V) = pair("V3", True, True, 0)
    S = 37
    wide = S * H * min(N, V)
    assert wide > S * (R + P), "the latents themselves would be taken for keys"
    ours = ours.clone(scan=False)
    positions = np.zeros((1, new_tokens), np.int32) + np.arange(new_tokens, dtype=np.int32)
    states = jax.eval_shape(lambda: model.init_states(ours, 1, S))
    variables = jax.eval_shape(lambda: nn.unbox(ours.init(jax.random.key(0), positions, Context.packed(positions))))

    def step(variables, states):
        return ours.apply(variables, positions, Context.decoding(positions), states)[:2]

    made = list(hlo.array_shapes(jax.make_jaxpr(step)(variables, states).jaxpr))
    assert any(S in shape and R in shape for shape in made)
    expanded = [shape for shape in made if S in shape and np.prod(shape) >= wide]
    assert bool(expanded) == (new_tokens > 1), expanded


@pytest.mark.parametrize(
    "check", [contract.check_decode, contract.check_state_bytes, contract.check_flops, orders.check_permutation]
)
def test_without_a_rotated_part(check):
    """No shared key, no rotation: the latents are all that the cache holds."""
    check("mixer", "mla(rope_dim=0)")


def test_without_a_rotated_part_there_is_no_shared_key():
    lm = contract.build("mixer", "mla(rope_dim=0, kv_rank=12)", position="rope")
    kernels = nn.unbox(model.abstract_params(lm))["groups"]["block_0"]["mixer"]
    assert kernels["kv_a"]["kernel"].shape == (2, 32, 12) and kernels["q"]["kernel"].shape == (2, 32, 4 * 8)
    shapes = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(lambda: model.init_states(lm, 3, 5)))]
    assert shapes == [(2, 3, 5, 12)]
