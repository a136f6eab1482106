"""Cosines of vectors, and the map that frees vectors of what all of them share; NumPy only."""

from collections.abc import Callable

import numpy as np

from in2core_jax.errors import UserError, how_many


def cosine_to(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """a_q . b_i / (|a_q| |b_i|) of every pair.

  Args:
    a: [Q, D].
    b: [N, D].

  Returns:
    float32 [Q, N], within [-1, 1]; 0 with a vector of zeros.

  Raises:
    UserError: vectors of different widths, or not finite.
  """
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
    raise UserError(f"cosines of embeddings {a.shape} and {b.shape}: both must be [examples, width] of one width")
  if not (np.isfinite(a).all() and np.isfinite(b).all()):
    raise UserError("cosines of embeddings that are not finite: look for NaN in the weights")
  return np.clip(unit(a) @ unit(b).T, -1, 1).astype(np.float32)


def whitening(vectors: np.ndarray, damping_ratio: float) -> Callable[[np.ndarray], np.ndarray]:
  """A map to where some vectors have no direction in common: x -> (C + damping I)^-1/2 (x - mean).

  C is their covariance, damping a share of its largest eigenvalue. Cosines of such images do not see what all texts
  share, which rules those of plain embeddings.

  Args:
    vectors: [N, D], which mean and C are of.
    damping_ratio: positive.

  Returns:
    [M, D] -> float64 [M, D].

  Raises:
    UserError: a ratio that is not positive, or vectors that are all the same.
  """
  vectors = np.asarray(vectors, np.float64)
  if not np.isfinite(vectors).all():
    raise UserError("whitening of embeddings that are not finite: look for NaN in the weights")
  center = vectors.mean(axis=0)
  values, directions = np.linalg.eigh(np.cov(vectors.T, bias=True))
  if not damping_ratio > 0 or not values[-1] > 0:
    raise UserError(
      f"whitening of {how_many(len(vectors), 'embedding')} with ratio {damping_ratio}: need different ones, above 0"
    )
  scale = 1 / np.sqrt(np.maximum(values, 0) + damping_ratio * values[-1])
  return lambda x: (np.asarray(x, np.float64) - center) @ directions * scale


def unit(vectors: np.ndarray) -> np.ndarray:
  """Rows [N, D] scaled to length 1; rows of zeros stay."""
  lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
  return vectors / np.where(lengths > 0, lengths, 1)
