"""Hardware one does not have: a training step compiled for it ahead of time, and what its program says of cost."""

KINDS = {"planned": "*"}
