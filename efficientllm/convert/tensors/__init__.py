"""Tensors of a checkpoint: their names in each family, their layouts, and loading them onto shards."""
