"""Trainer with efficientllm: the model from a config, and the package's training step on one CPU device."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import work

from efficientllm import base_config, sharding
from efficientllm.architecture import from_config
from efficientllm.embeds.condition import Condition
from efficientllm.objectives.base import Objective, with_router_losses
from efficientllm.train import step


@dataclasses.dataclass(frozen=True)
class Given(Objective):
    """Mean square error of a prediction whose noise and levels are those of the batch, as both contestants need."""

    reads = "images"

    def axes(self, model):
        return {"noisy": (None,) * 3, "levels": (), "labels": (), "target": (None,) * 3}

    def totals(self, batch, accumulate):
        return ()

    def loss(self, model, params, batch, key, totals):
        condition = Condition.of(batch)
        prediction, aux = model.apply({"params": params}, batch["noisy"], batch["levels"], condition)
        return with_router_losses(jnp.mean(jnp.square(prediction - batch["target"])), aux)

    def counts(self, model, batch):
        return {"tokens": 0, "samples": len(batch["labels"])}


class Trainer:
    """`step(batch)` trains on one batch and returns its loss before the update; `forward(batch)` predicts alone."""

    def __init__(self, shape, precision):
        config = _config(shape, precision)
        model = from_config.from_config(config.model)
        params = _parameters(work.initial_weights(shape), shape)
        mesh = sharding.make_mesh("data=1", jax.devices()[:1])
        jax.set_mesh(mesh)
        init = step.init_state(model, config.train, 0, shape.tokens)
        abstract = jax.eval_shape(init)
        shardings = sharding.shardings(abstract, mesh)
        jax.tree.map(_same_shape, nn.unbox(abstract.params), params)
        self.state = jax.jit(lambda params: nn.unbox(init()).replace(params=params), out_shardings=shardings)(params)
        self.train = step.jit_train_step(model, config.train, mesh, shardings, objective=Given())
        self.predict = jax.jit(functools.partial(_mean_square, model))

    def step(self, batch):
        self.state, metrics = self.train(self.state, batch)
        jax.block_until_ready(self.state)
        return float(metrics["loss"])

    def forward(self, batch):
        return float(self.predict(self.state.params, batch["noisy"], batch["levels"], Condition.of(batch)))


def _mean_square(model, params, *inputs):
    return jnp.mean(jnp.square(model.apply({"params": params}, *inputs)[0]))


def versions():
    return {"jax": jax.__version__}


def _config(shape, precision):
    """diffusers' DiT differs from the published one in its time frequencies and in the eps of one norm."""
    config = base_config.get_config()
    config.model.size = (
        f"custom(num_layers={shape.layers}, dim={shape.dim}, num_heads={shape.heads}, num_kv_heads={shape.heads}, "
        f"head_dim={shape.head_dim}, hidden={4 * shape.dim}, rope_base=1e4)"
    )
    config.model.embed = (
        f"patches(patch={shape.patch}, side={shape.side}, channels={shape.channels}, classes={work.CLASSES}, "
        "time_denominator=127, ffn_norm_eps=1e-5)"
    )
    config.model.mixer = "mha(qkv_bias=True, o_bias=True)"
    config.model.ffn = "gelu(kind='tanh')"
    config.model.norm = "layernorm(affine=False)"
    config.model.modulation, config.model.position = "linear", "sincos2d"
    config.model.precision = precision
    (b1, b2), eps = work.OPTIMISER["betas"], work.OPTIMISER["eps"]
    config.train.optimizer = f"adamw(b1={b1}, b2={b2}, eps={eps})"
    config.train.schedule = f"constant(peak={work.OPTIMISER['lr']})"
    config.train.decay = ((".*", work.OPTIMISER["weight_decay"]),)
    config.train.clip = 0.0
    return config


def _parameters(weights, shape):
    """Converts weights by diffusers' names to the package's tree: transposed kernels, stacked layers."""

    def linear(name):
        return {"kernel": weights[f"{name}.weight"].T, "bias": weights[f"{name}.bias"]}

    def stacked(name):
        layers = [linear(f"transformer_blocks.{i}.{name}") for i in range(shape.layers)]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)

    patch = weights["pos_embed.proj.weight"].reshape(shape.dim, -1).T
    names = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
    return {
        "patch": {"kernel": patch, "bias": weights["pos_embed.proj.bias"]},
        "time": {"0": linear("time.linear_1"), "2": linear("time.linear_2")},
        "label_table": weights["labels.weight"],
        "groups": {
            "block_0": {
                "modulation": stacked("norm1.linear"),
                "mixer": {ours: stacked(f"attn1.{theirs}") for ours, theirs in names.items()},
                "ffn": {"up": stacked("ff.net.0.proj"), "down": stacked("ff.net.2")},
            }
        },
        "final": {"modulation": linear("proj_out_1"), **linear("proj_out_2")},
    }


def _same_shape(expected, given):
    if expected.shape != given.shape:
        raise RuntimeError(f"a weight has shape {given.shape}, the model wants {expected.shape}")
