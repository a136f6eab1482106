"""Influence-based coreset selection for instruction tuning, in JAX."""

__version__ = "0.3.0"
