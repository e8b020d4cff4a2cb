"""Trainer with efficientllm: the model from a config, and the package's training step on one CPU device."""

import flax.linen as nn
import jax
import numpy as np
import work

from efficientllm import base_config, model, sharding
from efficientllm.architecture import from_config
from efficientllm.train import step


class Trainer:
    """`step(tokens)` trains on one batch and returns its loss (nats per target) before the update.

    `unrolled` compiles every layer on its own (`config.model.scan = False`). The default scans over layers.
    """

    def __init__(self, shape, precision, length, unrolled=False, seed=0):
        config = _config(shape, precision)
        lm = from_config.from_config(config.model)
        params = _parameters(work.initial_weights(shape, seed), shape)
        if unrolled:
            lm, params = model.unroll(lm, params)
        mesh = sharding.make_mesh("data=1", jax.devices()[:1])
        jax.set_mesh(mesh)
        abstract = jax.eval_shape(step.init_state(lm, config.train, 0, length))
        shardings = sharding.shardings(abstract, mesh)
        jax.tree.map(_same_shape, nn.unbox(abstract.params), params)
        self.state = jax.jit(
            lambda params: nn.unbox(step.init_state(lm, config.train, 0, length)()).replace(params=params),
            out_shardings=shardings,
        )(params)
        self.train = step.jit_train_step(lm, config.train, mesh, shardings)

    def step(self, tokens):
        self.state, metrics = self.train(self.state, _batch(tokens))
        jax.block_until_ready(self.state)
        return float(metrics["loss"])


def versions():
    return {"jax": jax.__version__}


def _config(shape, precision):
    config = base_config.get_config()
    config.model.size = (
        f"tiny(num_layers={shape.layers}, dim={shape.dim}, num_heads={shape.heads}, num_kv_heads={shape.kv_heads}, "
        f"head_dim={shape.head_dim}, hidden={shape.hidden}, vocab_size={shape.vocab}, qkv_bias=True, "
        f"rope_base={work.ROPE_BASE}, norm_eps={work.NORM_EPS})"
    )
    config.model.precision = precision
    (b1, b2), eps = work.OPTIMISER["betas"], work.OPTIMISER["eps"]
    config.train.optimizer = f"adamw(b1={b1}, b2={b2}, eps={eps})"
    config.train.schedule = f"constant(peak={work.OPTIMISER['lr']})"
    config.train.decay = ((".*", work.OPTIMISER["weight_decay"]),)
    config.train.clip = work.CLIP
    return config


def _parameters(weights, shape):
    """Converts weights by transformers' names to the package's tree: transposed kernels, stacked layers."""

    def stack(name):
        layers = np.stack([weights[f"model.layers.{i}.{name}"] for i in range(shape.layers)])
        return layers.swapaxes(1, 2) if layers.ndim == 3 else layers

    def linear(name, bias=False):
        kernel = {"kernel": stack(f"{name}.weight")}
        return kernel | {"bias": stack(f"{name}.bias")} if bias else kernel

    mixer = {name: linear(f"self_attn.{name}_proj", bias=name != "o") for name in "qkvo"}
    ffn = {name: linear(f"mlp.{name}_proj") for name in ("gate", "up", "down")}
    norms = {"mixer_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    block = {ours: {"scale": stack(f"{theirs}.weight")} for ours, theirs in norms.items()}
    return {
        "embedding": weights["model.embed_tokens.weight"],
        "groups": {"block_0": block | {"mixer": mixer, "ffn": ffn}},
        "norm": {"scale": weights["model.norm.weight"]},
    }


def _same_shape(expected, given):
    if expected.shape != given.shape:
        raise RuntimeError(f"a weight has shape {given.shape}, the model wants {expected.shape}")


def _batch(tokens):
    """One document per row. As in transformers, the last position of a row has no target."""
    rows, length = tokens.shape
    weights = np.ones((rows, length), np.float32)
    weights[:, -1] = 0
    return {
        "tokens": tokens.astype(np.int32),
        "targets": np.roll(tokens, -1, axis=1).astype(np.int32),
        "segments": np.ones((rows, length), np.int32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
        "weights": weights,
    }
