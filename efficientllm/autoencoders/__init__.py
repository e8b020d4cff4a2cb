"""Autoencoders: frozen maps from images, or clips, to the latents that a model learns, and back."""

KINDS = {"autoencoder": "*"}
