"""Parameter-efficient tuning: which leaves are put around a model's kernels, and which parameters learn.

A method is a dataclass registered as ("adapter", name): `wrap` makes the leaf (a `weights.Weight`) that takes a
kernel's place, `trains` says which parameters learn, `rates` what their learning rates are multiplied with. Models
never hear of it.
"""

KINDS = {"adapter": "*"}
