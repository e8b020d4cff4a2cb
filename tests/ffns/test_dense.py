"""Dense feed-forward networks against torch and transformers, in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import contract
from efficientllm.registry import build
from tiers import slow_except

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.quick
D, F = 12, 20
X = 3 * np.random.default_rng(0).standard_normal((2, 5, D), np.float32)  # reaches the tails of every activation


def jittered(module):
    """The module in evaluation, with noise on every parameter."""
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.from_numpy(0.3 * rng.standard_normal(parameter.shape, np.float32))
    return module.eval()


def tree(**layers):
    """`{our name: {kernel, bias}}` of torch's linear layers."""
    arrays = {name: {"kernel": layer.weight.T, "bias": layer.bias} for name, layer in layers.items()}
    return {
        name: {key: tensor.detach().numpy() for key, tensor in pair.items() if tensor is not None}
        for name, pair in arrays.items()
    }


def clip(activation):
    from transformers.models.clip import modeling_clip

    config = transformers.CLIPTextConfig(
        hidden_size=D, intermediate_size=F, num_attention_heads=2, hidden_act=activation
    )
    module = jittered(modeling_clip.CLIPMLP(config))
    return module, tree(up=module.fc1, down=module.fc2)


def t5():
    from transformers.models.t5 import modeling_t5

    config = transformers.T5Config(d_model=D, d_ff=F, feed_forward_proj="gated-gelu")
    module = jittered(modeling_t5.T5DenseGatedActDense(config))
    return module, tree(gate=module.wi_0, up=module.wi_1, down=module.wo)


def qwen_vl_tower(activation="silu"):
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

    config = transformers.Qwen2_5_VLTextConfig(hidden_size=D, intermediate_size=F, hidden_act=activation)
    module = jittered(modeling.Qwen2_5_VLMLP(config, bias=True))
    return module, tree(gate=module.gate_proj, up=module.up_proj, down=module.down_proj)


REFERENCES = {
    "gelu": lambda: clip("gelu"),
    "gelu(kind='tanh')": lambda: clip("gelu_pytorch_tanh"),
    "gelu(kind='quick')": lambda: clip("quick_gelu"),
    "geglu(kind='tanh')": t5,
    "geglu(use_bias=True)": lambda: qwen_vl_tower("gelu"),
    "swiglu(use_bias=True)": qwen_vl_tower,
}


@pytest.mark.parametrize("spec", REFERENCES)
def test_values_and_gradients_are_the_reference_s(spec):
    module, params = REFERENCES[spec]()
    ffn = build("ffn", spec, {"hidden": F, "precision": "float32"})
    shapes = jax.tree.map(jnp.shape, nn.unbox(jax.eval_shape(ffn.init, jax.random.key(0), X)["params"]))
    assert shapes == jax.tree.map(jnp.shape, params)
    x = torch.tensor(X, requires_grad=True)
    theirs = module(x)
    (theirs**2).sum().backward()
    apply = jax.jit(lambda x: ffn.apply({"params": params}, x)[0])
    np.testing.assert_allclose(apply(X), theirs.detach().numpy(), rtol=1e-5, atol=2e-5)
    grad = jax.grad(lambda x: jnp.sum(apply(x) ** 2))(X)
    np.testing.assert_allclose(grad, x.grad.numpy(), rtol=1e-4, atol=1e-5 * np.abs(grad).max())


def initial(spec):
    ffn = build("ffn", spec, {"hidden": F, "precision": "float32"})
    return nn.unbox(jax.jit(ffn.init)(jax.random.key(0), X)["params"])


def test_biases_are_optional_and_zero_at_first():
    for spec in ("swiglu", "geglu", "gelu(use_bias=False)"):
        assert {key for layer in initial(spec).values() for key in layer} == {"kernel"}, spec
    for spec in ("swiglu(use_bias=True)", "geglu(use_bias=True)", "gelu"):
        assert all(not jnp.any(layer["bias"]) for layer in initial(spec).values()), spec


VARIANTS = ("swiglu(use_bias=True)", "geglu(kind='tanh', use_bias=True)", "gelu(kind='quick')")
CHECKS = (contract.check_flops, contract.check_gradients, contract.check_leaves, contract.check_compressed)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("spec", slow_except(VARIANTS, VARIANTS[0]))
def test_contract_of_variants(spec, check):
    check("ffn", spec)
