"""Inference: a checkpoint served, its prefill and decode measured, its completions streamed."""

KINDS = {"sampler": "samplers"}
