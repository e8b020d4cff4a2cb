"""Optimizers, learning-rate schedules, and rates by parameter name."""

KINDS = {"optimizer": "optimizers", "schedule": "schedules"}
