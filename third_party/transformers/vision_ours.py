"""Server and Tuner with efficientllm: the package's engine and training step, on one CPU device."""

import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import vision_work as work

from efficientllm import base_config, convert, model, sharding
from efficientllm.embeds.vision_language import BATCH_KEYS
from efficientllm.infer import samplers
from efficientllm.infer.engine import Engine
from efficientllm.infer.multimodal_prompts import encode_prompts
from efficientllm.ops import rematerialization
from efficientllm.quant import apply as quant
from efficientllm.registry import build
from efficientllm.runtime import malloc
from efficientllm.train import step
from efficientllm.vision.token_rows import Prompt, make_batch
from efficientllm.vision.tower_rows import PreparedImage
from efficientllm.weights import box_as

_ADAPTER = f"lora(rank={work.RANK}, alpha={work.ALPHA}, target='{work.OUR_TARGET}')"


class Server:
    """`prefill(prompt)` computes the logits of the first new token; `decode(prompt, steps)` goes on from there."""

    def __init__(self, folder, precision, threads, length):
        source = convert.open_source(folder)
        lm = source.lm(precision=precision).clone(scan=False, remat=rematerialization.SAVEABLE)
        mesh = _mesh()
        shapes = sharding.abstract_shards(model.abstract_params(lm), mesh)
        params = source.load(shapes, lm=lm, transform=quant.rounder(_form(precision)))
        self.engine = Engine(lm, params, samplers.Greedy(), -1, length)

    def prefill(self, prompt):
        return jax.block_until_ready(self._prefill(prompt)[0]).logits_BV

    def logits(self, logits_BV):
        return np.asarray(logits_BV[0], np.float32)

    def decode(self, prompt, steps):
        carry, ids = self._prefill(prompt)
        carry, first = jax.block_until_ready(self.engine.decode(carry, ids, 1))
        begin = time.perf_counter()
        _, rest = jax.block_until_ready(self.engine.decode(carry, ids, steps))
        return time.perf_counter() - begin, [int(first[0, 0]), *rest[0].tolist()]

    def _prefill(self, prompt):
        ids, images = encode_prompts(self.engine.lm, self.engine.params, [_prompt(prompt)])
        return self.engine.prefill(ids, images=images), ids


class Tuner:
    """`step(batch)` trains on what `prepare(prompts)` makes, and returns the loss before the update."""

    def __init__(self, folder, precision, threads, prompts):
        train, method, form = _config(), build("adapter", _ADAPTER), _form(precision)
        source, mesh = convert.open_source(folder), _mesh()
        self.lm = source.lm(precision=precision)
        batch = self.prepare(prompts)
        self.lm = self.lm.clone(row_slots=batch["patch_frames"].shape[1])
        boxed = model.abstract_params(self.lm)
        abstract = jax.eval_shape(step.init_state(self.lm, train, 0, batch["tokens"].shape[1], method, form))
        shardings = sharding.shardings(abstract, mesh)
        jitted = step.jit_train_step(self.lm, train, mesh, shardings, method)
        # As in a run, the step is compiled from shapes before weights are read.
        self.train = jitted.lower(sharding.abstract_shards(abstract, mesh), batch).compile()
        malloc.trim()

        def create(params):
            return nn.unbox(step.create(self.lm, train, method, 0, boxed, box_as(boxed, params), form))

        rounder = quant.rounder(form, quant.UNROUNDED)
        params = source.load(sharding.abstract_shards(boxed, mesh), lm=self.lm, transform=rounder)
        self.state = jax.jit(create, out_shardings=shardings, donate_argnums=0)(params)
        malloc.trim()

    @property
    def trained(self):
        return sum(leaf.size for leaf in jax.tree.leaves(self.state.params))

    def prepare(self, prompts):
        made, labels = make_batch(self.lm, [_prompt(prompt) for prompt in prompts]), work.labels(prompts)
        ctx, images = made.ctx, made.ctx.images
        patches = {BATCH_KEYS[field]: array for field, array in images.patches._asdict().items() if array is not None}
        return patches | {
            "tokens": made.tokens_BT,
            "targets": np.where(labels == work.IGNORED, 0, labels).astype(np.int32),
            "weights": (labels != work.IGNORED).astype(np.float32),
            "segments": ctx.mask.segments_BT,
            "positions": ctx.positions_BT,
            "coordinates": ctx.coordinates_BTA,
            "slots": images.slots_BT,
        }

    def step(self, batch):
        self.state, metrics = self.train(self.state, jax.tree.map(jnp.asarray, batch))
        jax.block_until_ready(self.state)
        return float(metrics["loss"])


def _mesh():
    mesh = sharding.make_mesh("data=1", jax.devices()[:1])
    jax.set_mesh(mesh)
    return mesh


def _form(precision):
    """The form of frozen kernels, of as many bits as torch's."""
    return "float32" if precision == "float32" else "bfloat16"


def _prompt(prompt):
    return Prompt(prompt.ids, [PreparedImage(prompt.pixels_Pc, prompt.grid, int(prompt.is_image.sum()))])


def _config():
    train = base_config.get_config().train
    (b1, b2), eps = work.OPTIMISER["betas"], work.OPTIMISER["eps"]
    train.optimizer = f"adamw(b1={b1}, b2={b2}, eps={eps})"
    train.schedule = f"constant(peak={work.OPTIMISER['lr']})"
    train.decay = ((".*", work.OPTIMISER["weight_decay"]),)
    train.clip = 0.0
    return train


def versions():
    return {"jax": jax.__version__}
