"""Training objectives: the fields of a batch, its loss, and its held-out evaluation."""

KINDS = {"objective": "*"}
