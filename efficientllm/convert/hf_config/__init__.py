"""Hugging Face `config.json`, from and to `config.model`."""
