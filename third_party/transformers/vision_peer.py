"""Server with transformers and Tuner with transformers + peft: eager mode with sdpa attention, as documented."""

import contextlib
import time

import numpy as np
import peft
import torch
import transformers
import vision_work as work


class Server:
    """`prefill(prompt)` computes the logits of the first new token; `decode(prompt, steps)` goes on from there."""

    def __init__(self, folder, precision, threads, length):
        self.model = _model(folder, precision, threads).eval()

    def prefill(self, prompt):
        with torch.inference_mode():
            return self.model(**self._inputs(prompt), use_cache=True, logits_to_keep=1).logits[0, -1]

    def logits(self, logits):
        return logits.float().numpy()

    def decode(self, prompt, steps):
        clock = _Clock()
        settings = {"max_new_tokens": steps + 1, "min_new_tokens": steps + 1, "do_sample": False}
        inputs = self._inputs(prompt)
        with torch.inference_mode():
            generated = self.model.generate(**inputs, streamer=clock, **settings)
        first, *_, last = clock.times[1:]  # the first put is the prompt
        return last - first, generated[0, len(prompt.ids) :].tolist()

    def _inputs(self, prompt):
        return _inputs([prompt], self.model.dtype)


class _Clock(transformers.generation.streamers.BaseStreamer):
    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


class Tuner:
    """`step(batch)` trains on what `prepare(prompts)` makes, and returns the loss before the update.

    In bfloat16 the frozen weights are, adapters are float32, and autocast multiplies.
    """

    def __init__(self, folder, precision, threads, prompts):
        self.half = precision == "bfloat16"
        config = peft.LoraConfig(r=work.RANK, lora_alpha=work.ALPHA, target_modules=work.PEFT_MODULES)
        self.model = peft.get_peft_model(_model(folder, precision, threads), config).train()
        self.trainable = [tensor for tensor in self.model.parameters() if tensor.requires_grad]
        self.optimiser = torch.optim.AdamW(self.trainable, fused=True, **work.OPTIMISER)

    @property
    def trained(self):
        return sum(tensor.numel() for tensor in self.trainable)

    def prepare(self, prompts):
        labels = torch.from_numpy(work.labels(prompts))
        return _inputs(prompts, torch.bfloat16 if self.half else torch.float32), labels

    def step(self, batch):
        inputs, labels = batch
        with torch.autocast("cpu", torch.bfloat16) if self.half else contextlib.nullcontext():
            loss = self.model(**inputs, labels=labels, shift_labels=labels, use_cache=False).loss
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.item()


def _model(folder, precision, threads):
    torch.set_num_threads(threads)
    kind = transformers.Qwen2_5_VLForConditionalGeneration
    return kind.from_pretrained(folder, dtype=getattr(torch, precision))


def _inputs(prompts, dtype):
    ids = torch.from_numpy(np.stack([prompt.ids for prompt in prompts]))
    pixels = np.concatenate([prompt.pixels_Pc for prompt in prompts])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": torch.from_numpy(np.stack([prompt.is_image for prompt in prompts])).long(),
        "pixel_values": torch.from_numpy(pixels).to(dtype),
        "image_grid_thw": torch.tensor([prompt.grid for prompt in prompts]),
    }


def versions():
    return {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
