"""Training objectives: the loss of a batch and its held-out evaluation."""
