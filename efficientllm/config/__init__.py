"""Config files and flags: the base config with every key, its schema, and values checked before JAX is imported."""
