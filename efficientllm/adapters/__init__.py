"""Parameter-efficient fine-tuning: adapters around a model's kernels, and the choice of trainable parameters.

A method is a dataclass registered as ("adapter", name). `wrap` makes the leaf (a `weights.Weight`) that replaces a
kernel, `trains` says which parameters are trainable, `rates` multiplies their learning rates. Models know nothing of
methods. An adapter's A is `[..., in, R]` and its B `[..., R, out]`; kernels are `[..., in, out]`.
"""

KINDS = {"adapter": "*"}
