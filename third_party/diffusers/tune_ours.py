"""Tuner with efficientllm: a pipeline's transformer, the package's training step and sampler, on one CPU device."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import ours
import tune_work as work

from efficientllm import base_config, convert, model, sharding
from efficientllm.embeds.condition import Condition
from efficientllm.infer.denoise import DiffusionSampler
from efficientllm.quant import apply as quant
from efficientllm.registry import build, format_spec, parse_spec
from efficientllm.runtime import malloc
from efficientllm.train import step
from efficientllm.weights import box_as

TRAINED_ON = ("noisy", "levels", "target", "text", "pooled")


@dataclasses.dataclass(frozen=True)
class Given(ours.Given):
    """As of the DiT, with states of texts for labels."""

    def axes(self, model):
        latents = (None,) * (len(model.size) + 1)
        conditions = {name: (None,) * len(row.shape) for name, row in model.condition_shapes().items()}
        return {"noisy": latents, "levels": (), "target": latents} | conditions

    def counts(self, model, batch):
        return {"tokens": 0, "samples": len(batch["levels"])}


class Tuner:
    """A pipeline's transformer with LoRA.

    `step(batch)` trains on one batch and returns its loss before the update. `sample(request(batch))` takes a sampling
    step with guidance; `request` computes what all steps read of a text.
    """

    def __init__(self, pipeline, precision, batch, scan=False):
        train, method = _config(), build("adapter", _ADAPTER)
        source = convert.open_source(pipeline)
        kind, fields = parse_spec(source.model["embed"])
        embed = format_spec(kind, fields | {"text_length": work.TOKENS})
        # Layers apart by default, as few layers on a CPU are best: slices of stacked weights are copies.
        self.lm = source.lm(precision=precision, embed=embed, scan=scan)
        mesh = sharding.make_mesh("data=1", jax.devices()[:1])
        jax.set_mesh(mesh)
        boxed = model.abstract_params(self.lm)
        # Frozen kernels have as many bits as torch's.
        form = "bfloat16" if precision == "bfloat16" else "float32"
        abstract = jax.eval_shape(step.init_state(self.lm, train, 0, 8, method, form))
        shardings = sharding.shardings(abstract, mesh)
        jitted = step.jit_train_step(self.lm, train, mesh, shardings, method, objective=Given())
        # As in a run, the step is compiled from shapes before weights are read.
        self.train = jitted.lower(sharding.abstract_shards(abstract, mesh), _trained_on(batch)).compile()
        malloc.trim()

        def create(params):
            return nn.unbox(step.create(self.lm, train, method, 0, boxed, box_as(boxed, params), form))

        rounder = quant.rounder(form, quant.UNROUNDED)
        params = source.load(sharding.abstract_shards(boxed, mesh), lm=self.lm, transform=rounder)
        self.state = jax.jit(create, out_shardings=shardings, donate_argnums=0)(params)
        malloc.trim()
        objective = build("objective", f"flow(shift={work.SHIFT})")
        solver = build("solver", f"euler(steps={work.SOLVER_STEPS}, levels='sd3')")
        self.sampler = DiffusionSampler(self.lm, objective, solver, work.GUIDANCE)
        self.has_sampled = False

    def step(self, batch):
        self.state, metrics = self.train(self.state, jax.tree.map(jnp.asarray, _trained_on(batch)))
        jax.block_until_ready(self.state)
        return float(metrics["loss"])

    def request(self, batch):
        wanted, negative = (
            Condition.of({name: jnp.asarray(batch[f"{prefix}{name}"]) for name in ("text", "pooled") if name in batch})
            for prefix in ("", "no_")
        )
        noisy, params = jnp.asarray(batch["noisy"]), self.state.all_params
        carry = self.sampler.begin(len(noisy), jax.random.key(0), noisy.shape[1:]).replace(x_BhwC=noisy)
        return jax.block_until_ready((self.sampler.request(params, wanted, negative), carry))

    def sample(self, request):
        carry = self.sampler.advance(self.state.all_params, *request, 0, 1)
        if not self.has_sampled:  # of what compilation leaves, as after that of the training step
            malloc.trim()
            self.has_sampled = True
        return float(np.square(np.asarray(carry.x_BhwC)).mean())


_ADAPTER = f"lora(rank={work.RANK}, alpha={work.ALPHA}, target='{work.OUR_TARGET}')"


def _trained_on(batch):
    return {name: array for name, array in batch.items() if name in TRAINED_ON}


def _config():
    train = base_config.get_config().train
    (b1, b2), eps = work.OPTIMISER["betas"], work.OPTIMISER["eps"]
    train.optimizer = f"adamw(b1={b1}, b2={b2}, eps={eps})"
    train.schedule = f"constant(peak={work.OPTIMISER['lr']})"
    train.decay = ((".*", work.OPTIMISER["weight_decay"]),)
    train.clip = 0.0
    return train


def versions():
    return ours.versions()
