"""Solvers of diffusion models: steps from noise to a picture.

A solver is a frozen dataclass registered as ("solver", name) and derived from `base.Solver`.
"""

KINDS = {"solver": "*"}
