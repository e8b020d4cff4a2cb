"""Measurement of a running process: memory, time, energy, and whether the machine was quiet meanwhile."""
