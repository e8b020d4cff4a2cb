"""Compares a model with one of transformers that has its shape and weights, in float32: logits, loss and gradients."""

import flax.traverse_util
import jax
import numpy as np
import pytest

from configs import base
from efficientllm.architecture import from_config
from efficientllm.objectives.cross_entropy import logits_nll_sum
from efficientllm.ops.attention import Context

torch = pytest.importorskip("torch")

VOCAB, B = 96, 2


def randomise(reference, seed, size=0.1):
    """Adds noise to every weight: biases and norm scales at their initial values would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(parameter + size * torch.randn(parameter.shape, generator=generator))
    return reference.eval()


def lm(size, **changes):
    """Builds our model of a size given by its fields."""
    config = base.get_config().model
    config.unroll = 0
    config.size = f"tiny({', '.join(f'{key}={value!r}' for key, value in size.items())})"
    config.tied = False
    config.update(changes)
    return from_config.from_config(config, VOCAB)


def tree(tensors, num_layers, layer, top):
    """Converts their parameters (or gradients) to our tree.

    Args:
      tensors: theirs by name.
      layer, top: `{our path: their name}` of a layer, whose names have `{}` for its number, and of the rest. Kernels
        are transposed; where theirs are `[in, out]` already, the name is followed by `.T`.
    """

    def leaf(path, name):
        value = tensors[name.removesuffix(".T")].detach().numpy()
        return value.T if path.endswith("kernel") and not name.endswith(".T") else value

    flat = {path: leaf(path, name) for path, name in top.items()}
    for path, name in layer.items():
        flat[f"groups/block_0/{path}"] = np.stack([leaf(path, name.format(i)) for i in range(num_layers)])
    return flax.traverse_util.unflatten_dict(flat, sep="/")


LLAMA_TOP = {
    "embedding": "model.embed_tokens.weight",
    "norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}
_FFN = {f"ffn/{name}/kernel": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
_NORMS = {"mixer_norm/scale": "input_layernorm.weight", "ffn_norm/scale": "post_attention_layernorm.weight"}


def llama_layer(mixer):
    """A layer of Llama's names around a mixer's `{our path: their name in self_attn}`."""
    attention = {f"mixer/{path}": f"self_attn.{name}" for path, name in mixer.items()}
    return {path: f"model.layers.{{}}.{name}" for path, name in (attention | _FFN | _NORMS).items()}


LLAMA_LAYER = llama_layer({f"{name}/kernel": f"{name}_proj.weight" for name in "qkvo"})


def batch(ids):
    """The batch of our loss for tokens `[B, T + 1]`."""
    rows, length = ids[:, 1:].shape
    return {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
        "weights": np.ones((rows, length), np.float32),
    }


def tokens(seed, length):
    return np.random.default_rng(seed).integers(0, VOCAB, (B, length), np.int32)


def logits(ours, params, ids):
    run = jax.jit(lambda params, ids, ctx: ours.apply({"params": params}, ids, ctx)[0])
    return run(params, ids, Context.packed(batch(np.pad(ids, ((0, 0), (0, 1))))["positions"]))


def close(ours, theirs, tolerance, path=()):
    """Asserts an error within `tolerance` of the largest value, or of 0.001: biases of keys have no gradient."""
    theirs = np.asarray(theirs)
    error = np.abs(np.asarray(ours) - theirs).max() / max(np.abs(theirs).max(), 1e-3)
    assert error <= tolerance, f"{jax.tree_util.keystr(path)}: relative error {error}"


def check(reference, ours, to_tree, ids, tolerance):
    """Logits, loss and every gradient of `to_tree({name: tensor})`; returns our parameters."""
    params = to_tree(dict(reference.named_parameters()))
    theirs = reference(torch.tensor(ids[:, :-1]).long()).logits
    loss = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), torch.tensor(ids[:, 1:]).long().flatten())
    loss.backward()

    @jax.jit
    def run(params, batch):
        def loss(params):
            logits, _, _ = ours.apply({"params": params}, batch["tokens"], Context.packed(batch["positions"]))
            return logits_nll_sum(logits, batch["targets"], batch["weights"]) / batch["weights"].size, logits

        return jax.value_and_grad(loss, has_aux=True)(params)

    (our_loss, our_logits), gradients = run(params, batch(ids))
    close(our_logits, theirs.detach(), tolerance)
    np.testing.assert_allclose(our_loss, loss.item(), rtol=tolerance)
    expected = to_tree({name: parameter.grad for name, parameter in reference.named_parameters()})
    jax.tree_util.tree_map_with_path(lambda path, a, b: close(a, b, tolerance, path), gradients, expected)
    return params


def unfuse(tensors, num_heads, fused="query_key_value"):
    """Adds `query`, `key` and `value` for each fused projection whose rows are `[H, 3, K]` (GPT-NeoX, BLOOM)."""
    apart = {}
    for name, tensor in tensors.items():
        if fused in name:
            kernels = tensor.unflatten(0, (num_heads, 3, -1)).unbind(1)
            names = (name.replace(fused, kernel_name) for kernel_name in ("query", "key", "value"))
            apart |= {kernel_name: tensor.flatten(0, 1) for kernel_name, tensor in zip(names, kernels, strict=True)}
    return tensors | apart


def named(paths, prefix=""):
    """`{our module: their module}` -> `{our parameter: their parameter}` for norms and linear maps with biases."""
    kind = {path: "scale" if path.endswith("norm") else "kernel" for path in paths}
    return {f"{path}/{kind[path]}": f"{prefix}{name}.weight" for path, name in paths.items()} | {
        f"{path}/bias": f"{prefix}{name}.bias" for path, name in paths.items()
    }
