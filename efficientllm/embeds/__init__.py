"""The ends of a model: how an input, and what conditions it, become vectors, and how vectors become an output."""

KINDS = {"embed": "*", "tower": "vision_tower"}
