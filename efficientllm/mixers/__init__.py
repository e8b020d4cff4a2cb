"""Sequence mixers: attention in its variants, state-space models and linear recurrences."""

KINDS = {"mixer": "*"}
