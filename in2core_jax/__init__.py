"""Influence-based coreset selection for instruction tuning, in JAX: `finetune`, `select`, `evaluate`, `recommend`."""

import importlib
import os

# transformers serves tokenizers only: its advice to install PyTorch would mislead.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.3.0"

_PUBLIC = {
  "Settings": "in2core_jax.pipeline.settings",
  "UserError": "in2core_jax.errors",
  "RecommendSettings": "in2core_jax.recommendation.settings",
} | dict.fromkeys(
  ("Evaluated", "Finetuned", "Recommended", "Selected", "evaluate", "finetune", "load", "recommend", "select"),
  "in2core_jax.api",
)

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str):
  """Public names are imported when they are asked for: a command that fails early shall not wait for JAX."""
  if name not in _PUBLIC:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
  return __all__
