"""Positional encodings: rotations of heads, additions to embeddings, biases of scores."""

KINDS = {"position": "*", "rope_scaling": "scaling"}
