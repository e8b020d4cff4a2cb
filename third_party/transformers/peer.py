"""Trainer with transformers + torch, as their documentation writes it: sdpa attention, eager mode, fused AdamW."""

import contextlib

import torch
import transformers
import work


class Trainer:
    """`step(tokens)` trains on one batch and returns its loss (nats per target) before the update."""

    def __init__(self, shape, precision, threads):
        torch.set_num_threads(threads)
        self.model = _model(shape)
        # The default of transformers.Trainer, and torch's fastest AdamW on a CPU.
        self.optimiser = torch.optim.AdamW(self.model.parameters(), fused=True, **work.OPTIMISER)
        self.precision = precision

    def step(self, tokens):
        ids = torch.from_numpy(tokens)
        half = self.precision == "bfloat16"
        with torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext():
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), work.CLIP)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.item()


def versions():
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _model(shape):
    config = transformers.Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.dim,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        rms_norm_eps=work.NORM_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": work.ROPE_BASE},
        tie_word_embeddings=True,
    )
    model = transformers.Qwen2ForCausalLM(config).float().train()
    weights = {name: torch.from_numpy(array) for name, array in work.initial_weights(shape).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or missing != ["lm_head.weight"]:  # tied to the embedding
        raise RuntimeError(f"weights do not fit Qwen2: missing {missing}, unexpected {unexpected}")
    return model
