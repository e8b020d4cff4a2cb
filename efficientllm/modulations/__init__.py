"""Modulations of a block: shift and scale of its normalized inputs, gates of its residual branches."""

KINDS = {"modulation": "*"}
