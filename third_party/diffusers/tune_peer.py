"""Tuner with diffusers + peft: a transformer in eager mode with sdpa attention, LoRA as diffusers' scripts add it."""

import contextlib
import functools

import diffusers
import numpy as np
import peft
import torch
import tune_work as work
from diffusers import training_utils


class Tuner:
    """A pipeline's transformer with LoRA. In bfloat16 the frozen weights are, and autocast multiplies.

    `step(batch)` trains on one batch and returns its loss before the update. `sample(request(batch))` takes a sampling
    step with guidance, as the pipeline does: both predictions in one call for pictures, in two for clips.
    """

    def __init__(self, pipeline, precision, threads):
        torch.set_num_threads(threads)
        self.half = precision == "bfloat16"
        self.model = _model(pipeline, torch.bfloat16 if self.half else torch.float32)
        self.trainable = [tensor for tensor in self.model.parameters() if tensor.requires_grad]
        self.optimiser = torch.optim.AdamW(self.trainable, fused=True, **work.OPTIMISER)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=work.SHIFT)
        scheduler.set_timesteps(work.SOLVER_STEPS)
        self.level, self.sigmas = float(scheduler.timesteps[0]), scheduler.sigmas[:2].tolist()

    def step(self, batch):
        tensors = self._tensors(batch)
        prediction = self._predict(tensors["noisy"], tensors["levels"], tensors["text"], tensors.get("pooled"))
        loss = torch.nn.functional.mse_loss(prediction.float(), _channels_first(batch["target"]))
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.item()

    def request(self, batch):
        return self._tensors(batch)

    def sample(self, tensors):
        noisy, states = tensors["noisy"], [tensors[name] for name in ("no_text", "text")]
        pooled = [tensors.get(name) for name in ("no_pooled", "pooled")]
        predict = functools.partial(self._predict, levels=None)
        with torch.no_grad():
            if pooled[0] is None:
                without, wanted = (predict(noisy, text=text) for text in states)
            else:
                both = predict(torch.cat([noisy] * 2), text=torch.cat(states), pooled=torch.cat(pooled))
                without, wanted = both.chunk(2)
            guided = without.float() + work.GUIDANCE * (wanted.float() - without.float())
            start, end = self.sigmas
            return float((noisy.float() + (end - start) * guided).square().mean())

    def _tensors(self, batch):
        tensors = {
            name: _channels_first(array) if name == "noisy" else torch.from_numpy(array)
            for name, array in batch.items()
            if name != "target"
        }
        half = torch.bfloat16 if self.half else torch.float32
        return {name: tensor if name == "levels" else tensor.to(half) for name, tensor in tensors.items()}

    def _predict(self, noisy, levels, text, pooled=None):
        levels = torch.full((len(noisy),), self.level) if levels is None else levels
        more = {} if pooled is None else {"pooled_projections": pooled}
        with torch.autocast("cpu", torch.bfloat16) if self.half else contextlib.nullcontext():
            return self.model(
                hidden_states=noisy, timestep=levels, encoder_hidden_states=text, return_dict=False, **more
            )[0]


def _channels_first(array):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))


def _model(pipeline, dtype):
    kind = getattr(diffusers, work.read_config(pipeline)["_class_name"])
    model = kind.from_pretrained(pipeline, subfolder="transformer", torch_dtype=dtype)
    model.requires_grad_(False)
    model.add_adapter(
        peft.LoraConfig(
            r=work.RANK, lora_alpha=work.ALPHA, init_lora_weights="gaussian", target_modules=work.PEFT_MODULES
        )
    )
    training_utils.cast_training_params(model, torch.float32)
    return model.train()


def versions():
    return {"torch": torch.__version__, "diffusers": diffusers.__version__, "peft": peft.__version__}
