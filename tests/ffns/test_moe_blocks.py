"""The mixture against the sparse blocks of transformers with the same weights, in float32: values and gradients."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficientllm.ffns import routing
from efficientllm.registry import build
from tiers import slow_case

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

B, T = 2, 23


def mixtral(rng, E, k, hidden, shared):
    return "mixtral", "Mixtral", {"num_local_experts": E, "intermediate_size": hidden}, ""


def qwen2_moe(rng, E, k, hidden, shared):
    config = {"num_experts": E, "moe_intermediate_size": hidden, "shared_expert_intermediate_size": shared}
    ours = f"normalise=False, shared_hidden={shared}, shared_gate=True"
    return "qwen2_moe", "Qwen2Moe", config | {"norm_topk_prob": False}, ours


def qwen3_moe(rng, E, k, hidden, shared):
    normalise = bool(rng.integers(2))
    config = {"num_experts": E, "moe_intermediate_size": hidden, "norm_topk_prob": normalise}
    return "qwen3_moe", "Qwen3Moe", config, f"normalise={normalise}"


def deepseek_v3(rng, E, k, hidden, shared):
    """Without its groups of experts, which one group of all is."""
    config = {"n_routed_experts": E, "moe_intermediate_size": hidden, "n_shared_experts": 2, "n_group": 1}
    config |= {"topk_group": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
    ours = f"scores='sigmoid', scale=2.5, shared_hidden={2 * hidden}, bias_rate=0.001"
    return "deepseek_v3", "DeepseekV3", config, ours


def pair(family, seed):
    """A random block of transformers, ours of the same shape, and random inputs for both."""
    rng = np.random.default_rng(seed)
    E, dim, hidden, shared = (int(rng.choice(sizes)) for sizes in ((4, 7, 16), (24, 40), (20, 36), (12, 28)))
    k = int(rng.integers(2, 5))  # one normalised expert has no router gradient to compare
    module, name, settings, ours = family(rng, E, k, hidden, shared)
    config = getattr(transformers, f"{name}Config")(hidden_size=dim, num_experts_per_tok=k, **settings)
    config._experts_implementation = "eager"
    modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    block = getattr(modeling, f"{name}SparseMoeBlock", None) or getattr(modeling, f"{name}MoE")
    block = block(config)
    torch.manual_seed(seed)
    with torch.no_grad():  # gates are made of zeros, which every expert ties for
        for tensor in (*block.parameters(), *block.buffers()):
            tensor.copy_(torch.randn(tensor.shape) / (tensor.shape[-1] ** 0.5 if tensor.ndim > 1 else 5))
    layer = build("ffn", f"moe(num_experts={E}, top_k={k}, hidden={hidden}, precision='float32', {ours})")
    return block, layer, rng.standard_normal((2, B, T, dim), np.float32)


def params(tensors):
    """Our tree from a block's tensors, or from their gradients, by name."""
    kernel = {name: np.swapaxes(tensor.detach().numpy(), -1, -2) for name, tensor in tensors.items() if tensor.ndim > 1}
    gate, up = np.split(kernel["experts.gate_up_proj"], 2, axis=-1)
    tree = {
        "router": {"kernel": kernel["gate.weight"]},
        "experts": {"gate": {"kernel": gate}, "up": {"kernel": up}, "down": {"kernel": kernel["experts.down_proj"]}},
    }
    if bias := [tensor for name, tensor in tensors.items() if name.endswith("bias")]:
        tree["router"]["bias"] = bias[0].numpy()
    shared = [name for name in kernel if name.startswith("shared") and "_proj" in name]
    if shared:
        tree["shared"] = {name.split(".")[1].removesuffix("_proj"): {"kernel": kernel[name]} for name in shared}
    if "shared_expert_gate.weight" in kernel:
        tree["shared_gate"] = {"kernel": kernel["shared_expert_gate.weight"]}
    return tree


def close(ours, theirs, path=""):
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert error <= 1e-5, f"{jax.tree_util.keystr(path)}: relative error {error}"


@pytest.mark.parametrize("seed", [0, slow_case(1)])
@pytest.mark.parametrize("family", [mixtral, qwen2_moe, slow_case(qwen3_moe), slow_case(deepseek_v3)])
def test_block(family, seed):
    block, layer, (x, dy) = pair(family, seed)
    x_torch = torch.tensor(x, requires_grad=True)
    expected = block(x_torch)
    expected.backward(torch.tensor(dy))

    @jax.jit
    def run(weights, x):
        y, pullback = jax.vjp(lambda weights, x: layer.apply({"params": weights}, x)[0], weights, x)
        return y, *pullback(dy)

    y, d_weights, dx = run(params(dict((*block.named_parameters(), *block.named_buffers()))), x)
    close(y, expected.detach().numpy())
    close(dx, x_torch.grad.numpy())
    bias = d_weights["router"].pop("bias", 0.0)
    assert np.all(bias == 0.0), "the balancing bias is no parameter of the loss"
    gradients = params({name: parameter.grad for name, parameter in block.named_parameters()})
    jax.tree_util.tree_map_with_path(lambda path, ours, theirs: close(ours, theirs, path), d_weights, gradients)


@pytest.mark.parametrize("E, k", [(4, 1), slow_case(7, 2), slow_case(16, 4)])
def test_load_balance_loss(E, k):
    reference = importlib.import_module("transformers.models.mixtral.modeling_mixtral").load_balancing_loss_func
    logits = np.random.default_rng(E).standard_normal((B, T, E), np.float32)
    router_logits = torch.tensor(logits.reshape(-1, E), requires_grad=True)
    expected = reference((router_logits,), E, k)
    expected.backward()

    def ours(logits):
        routed = routing.route(logits, k, "softmax", normalise=True, scale=1.0)
        return routing.load_balance_loss(routed, routing.load(routed.experts_BTk, E))

    loss, gradient = jax.value_and_grad(ours)(jnp.asarray(logits))
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient.reshape(-1, E), router_logits.grad.numpy(), atol=1e-7)
