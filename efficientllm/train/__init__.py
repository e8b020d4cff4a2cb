"""Training: set-up, the compiled step, the loop, checkpoints and what is measured of them."""
