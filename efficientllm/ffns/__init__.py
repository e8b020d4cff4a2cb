"""Feed-forward networks: dense ones and mixtures of experts."""

KINDS = {"ffn": "*"}
