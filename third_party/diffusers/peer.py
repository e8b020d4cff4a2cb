"""Trainer with diffusers + torch: its DiT in eager mode with sdpa attention, fused AdamW."""

import contextlib

import diffusers
import numpy as np
import torch
import work


class Trainer:
    """`step(batch)` trains on one batch and returns its loss before the update; `forward(batch)` predicts alone."""

    def __init__(self, shape, precision, threads):
        torch.set_num_threads(threads)
        self.model = _model(shape)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), fused=True, **work.OPTIMISER)
        self.precision = precision

    def step(self, batch):
        loss = torch.nn.functional.mse_loss(self._predict(batch).float(), _channels_first(batch["target"]))
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.item()

    def forward(self, batch):
        with torch.no_grad():
            return float(self._predict(batch).float().square().mean())

    def _predict(self, batch):
        half = self.precision == "bfloat16"
        levels, labels = torch.from_numpy(batch["levels"]), torch.from_numpy(batch["labels"].astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext():
            return self.model(_channels_first(batch["noisy"]), timestep=levels, class_labels=labels).sample


def _channels_first(images_BhwC):
    return torch.from_numpy(np.ascontiguousarray(images_BhwC.transpose(0, 3, 1, 2)))


def _model(shape):
    """The model in evaluation mode: in training mode it would drop labels at random."""
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=shape.heads,
        attention_head_dim=shape.head_dim,
        in_channels=shape.channels,
        out_channels=shape.channels,
        num_layers=shape.layers,
        sample_size=shape.side,
        patch_size=shape.patch,
        num_embeds_ada_norm=work.CLASSES,
    )
    weights = {name: torch.from_numpy(value) for name, value in work.initial_weights(shape).items()}
    embedders = {
        "timestep_embedder.linear_1": "time.linear_1",
        "timestep_embedder.linear_2": "time.linear_2",
        "class_embedder.embedding_table": "labels",
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _, is_embedder, rest = name.partition(".norm1.emb.")
            module, _, kind = rest.rpartition(".")
            parameter.copy_(weights[f"{embedders[module]}.{kind}" if is_embedder else name])
    return model.eval()


def versions():
    return {"torch": torch.__version__, "diffusers": diffusers.__version__}
