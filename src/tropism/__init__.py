"""Tropism: align diffusion models to reward functions."""

__version__ = "0.1.0"
