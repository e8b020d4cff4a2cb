"""From `config.model` to a language model: named sizes, specs completed from them, and equal parameter counts."""

KINDS = {"size": "sizes"}
