"""Plans: a training step or request compiled ahead of time for hardware that is not here, and its estimated cost."""

KINDS = {"planned": "*"}
