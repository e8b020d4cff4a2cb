"""States of texts that diffusion models are conditioned on: computed by a pipeline's text encoders, cached, or read."""

KINDS = {"text_states": "sources"}
