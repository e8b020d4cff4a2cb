"""Models from `config.model`: named sizes, and widths at which two architectures have equal parameters."""

KINDS = {"size": "sizes"}
