"""Rotary positions of a GGUF file: from its metadata and from the tensors that hold factors of frequencies.

A converter writes the scaling of Llama 3 as a tensor: each pair's frequency is divided by its entry of rope_freqs. The
four numbers that it was made of are found again and must give the stored factors, so that export can say them.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from in2core_jax.errors import UserError
from in2core_jax.model.gguf_file import GgufFile
from in2core_jax.model.schema import shown

FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
FACTOR_TENSORS = (FREQUENCIES, LONG, SHORT)
# Keys behind "ARCHITECTURE." that are read here, or that say nothing more.
ROPE_KEYS = {"rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scaling.attn_factor"}


def read_rope(file: GgufFile, get: Callable, head_dim: int, partial: bool) -> tuple[float, Any, int]:
  """Rotary base, scaling as `ModelConfig` holds it, and how many entries of a head are rotated.

  Args:
    file: the file.
    get: (key behind "ARCHITECTURE.", default) -> value.
    head_dim: entries of a head.
    partial: whether heads may be rotated in part.

  Raises:
    UserError: a scaling that this decoder does not have, or factors that no known scaling gives.
  """
  origin, theta = str(file.path), get("rope.freq_base", 10000.0)
  rotated, kind = get("rope.dimension_count", head_dim), get("rope.scaling.type", "none")
  if rotated != head_dim and not partial or rotated % 2 or rotated > head_dim:
    raise UserError(f"{origin}: {rotated} of {head_dim} entries of a head are rotated, which is not supported here")
  factors = {name: file.read(name).astype(np.float64) for name in FACTOR_TENSORS if name in file.tensors}
  wrong = next((name for name, value in factors.items() if value.shape != (rotated // 2,) or not (value > 0).all()), "")
  if wrong:
    raise UserError(f"{origin}: tensor {wrong} must hold {rotated // 2} factors above 0; fetch the file again")
  if factors.keys() == {LONG, SHORT} and kind in ("none", "longrope"):
    return theta, _longrope(factors, get), rotated
  attention = get("rope.scaling.attn_factor", 1.0)
  if attention != 1:
    raise UserError(f"{origin}: rope.scaling.attn_factor {attention} is not supported with {shown(kind)} scaling")
  if factors.keys() == {FREQUENCIES} and kind == "none":
    return theta, llama3_scaling(factors[FREQUENCIES], theta, rotated, origin), rotated
  if factors or kind not in ("none", "linear", "yarn"):
    raise UserError(
      f"{origin}: rotary scaling {shown(kind)}{' with ' + ', '.join(factors) if factors else ''} is not read from "
      "GGUF; use the model's hf: folder"
    )
  scaling = {} if kind == "none" else {"rope_type": kind, "factor": get("rope.scaling.factor")}
  if kind == "yarn":
    scaling |= {"original_max_position_embeddings": get("rope.scaling.original_context_length")}
  return theta, tuple(sorted(scaling.items())) or None, rotated


def _longrope(factors: dict[str, np.ndarray], get: Callable) -> tuple[tuple[str, Any], ...]:
  """Scaling of Phi-3: factors for short and for long examples, and one of cosines and sines."""
  length, trained = get("context_length"), get("rope.scaling.original_context_length")
  attention = get("rope.scaling.attn_factor", 1.0)
  by_rule = math.sqrt(1 + math.log(length / trained) / math.log(trained)) if length > trained > 1 else 1.0
  same = math.isclose(by_rule, attention, rel_tol=1e-6)
  scaling = {"max_position_embeddings": length} if same else {"attention_factor": attention}
  scaling |= {
    "rope_type": "longrope",
    "original_max_position_embeddings": trained,
    "short_factor": tuple(_short(value) for value in factors[SHORT]),
    "long_factor": tuple(_short(value) for value in factors[LONG]),
  }
  return tuple(sorted(scaling.items()))


def _short(value: float) -> float:
  """The shortest number that is this one in float32: 1.0800000429 was written as 1.08."""
  return float(str(np.float32(value)))


def llama3_scaling(factors: np.ndarray, theta: float, rotated: int, origin: str) -> tuple[tuple[str, Any], ...] | None:
  """The scaling llama3 whose factors these are; None where all are 1.

    factor_j = 1 / ((1 - s_j) / factor + s_j),   s_j = clip((original / wavelength_j - low) / (high - low), 0, 1)

  Between its ends s is a line in 1 / wavelength, so that with low = 1 two of its points give the other numbers. One is
  enough with high = 4, and with the 8192 positions of every release none is needed. Only a guess that gives the factors
  back is taken.

  Args:
    factors: [rotated / 2], what frequencies are divided by.
    theta: rotary base.
    rotated: entries of a head that are rotated.
    origin: of the factors, for messages.

  Raises:
    UserError: no such numbers give these factors.
  """
  if np.all(factors == 1):
    return None
  turns = theta ** (-np.arange(0, rotated, 2) / rotated) / (2 * math.pi)  # 1 / wavelength
  factor = round(float(factors.max()), 4)
  share = (1 / factors - 1 / factor) / (1 - 1 / factor)
  inner = (share > 1e-4) & (share < 1 - 1e-4)
  guesses = [(8192.0, 4.0), *(((3 * s + 1) / turn, 4.0) for s, turn in zip(share[inner], turns[inner], strict=True))]
  if inner.sum() >= 2:
    slope, start = np.polyfit(turns[inner], share[inner], 1)
    high = 1 - 1 / start
    guesses.append((slope * (high - 1), high))
  for original, high in guesses:
    original, high = round(original), round(high, 3)
    smooth = np.clip((original * turns - 1) / (high - 1), 0, 1)
    if high > 1 and np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-5, atol=0):
      scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": high}
      return tuple(sorted((scaling | {"original_max_position_embeddings": original}).items()))
  raise UserError(f"{origin}: the factors of {FREQUENCIES} are of no scaling that is known; use the model's hf: folder")
