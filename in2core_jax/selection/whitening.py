"""Cosines of gradients in the metric in which the pool's gradients have no direction in common. NumPy and SciPy only.

  <x, y>_M = x . M y,   M = (C + damping I)^-1,   C = (1/n) sum_i u_i u_i^T,   u_i = g_i / |g_i|
  cos_M(x, y) = <x, y>_M / sqrt(<x, x>_M <y, y>_M)

What all gradients share (the direction that every example pulls the model in) decides a plain product or cosine, and
says nothing about which example serves which query. M divides it out. Unit gradients make C, so that a few examples
with large gradients do not decide what counts as shared; cosines make the length of an example's gradient mean nothing.

M is never formed. With fewer rows than numbers in a row it is written over the rows (Woodbury's identity, K = U U^T):

  <x, y>_M = (x . y - (U x) . (n damping I + K)^-1 (U y)) / damping

Letters: N examples of the pool, Q queries, W numbers of one projected gradient, n rows behind C.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
import scipy.linalg
import scipy.sparse.linalg

from in2core_jax.errors import UserError, how_many
from in2core_jax.selection import aggregation

MOST_ROWS = 4096  # behind C: their products with each other are 134 MB, and more rows hardly move C
DAMPING_RATIO = 0.1
_COLUMNS = 4096  # of the features that are float64 at the same time


def products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """a_i . b_j of every pair, summed in float64 without a float64 copy of all columns; float64 [len(a), len(b)]."""
  total = np.zeros((len(a), len(b)))
  for start in range(0, a.shape[1], _COLUMNS):
    left = a[:, start : start + _COLUMNS].astype(np.float64)
    right = left if b is a else b[:, start : start + _COLUMNS].astype(np.float64)
    total += left @ right.T
  return total


def lengths(rows: np.ndarray) -> np.ndarray:
  """|x_i| in float64 [N], without a float64 copy of all rows."""
  return np.sqrt(np.concatenate([np.sum(part.astype(np.float64) ** 2, axis=1) for part in _blocks(rows)]))


def _blocks(rows: np.ndarray, size: int = 1024):
  return [rows[start : start + size] for start in range(0, max(len(rows), 1), size)]


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
  """Rows and what a `WhitenedMetric` makes of them.

  Attributes:
    rows: [m, W].
    image: f64 [m, n or W], what is multiplied beside the plain products.
    square: f64 [m], <x_i, x_i>_M.
  """

  rows: np.ndarray
  image: np.ndarray
  square: np.ndarray

  def take(self, rows: np.ndarray) -> "Measured":
    """Some of them."""
    return Measured(self.rows[rows], self.image[rows], self.square[rows])


@dataclasses.dataclass(frozen=True, eq=False)
class WhitenedMetric:
  """M = (C + damping I)^-1 of a pool; make one with `fit`.

  Attributes:
    rows: f64 or f32 [n, W], unit gradients behind C; none of them, [0, W], in the form over the numbers.
    factor: Cholesky factor of C + damping I (over the numbers) or of damping I + K / n (over the rows).
    damping: absolute.
    over_rows: which of the two forms this is.
  """

  rows: np.ndarray
  factor: np.ndarray
  damping: float
  over_rows: bool

  @classmethod
  def fit(
    cls,
    features: np.ndarray,
    damping_ratio: float = DAMPING_RATIO,
    ids: Sequence[str] | None = None,
    counted: np.ndarray | None = None,
  ) -> "WhitenedMetric":
    """The metric of a pool.

    Args:
      features: f32 or f64 [N, W]; rows of zeros say nothing and are left out of C.
      damping_ratio: damping as a share of C's largest eigenvalue, positive.
      ids: N example ids; of more than `MOST_ROWS` examples those with the smallest hashes of their ids make C, so that
        the order of reading does not matter. Without ids: by row.
      counted: bool [N], which rows make C; None: all.

    Raises:
      UserError: no row that is not zero, or a ratio that is not positive and finite.
    """
    size = lengths(features)
    kept = np.flatnonzero(size > 0 if counted is None else (size > 0) & counted)
    if not 0 < damping_ratio < np.inf or not kept.size:
      raise UserError(
        f"whitened metric of {how_many(kept.size, 'gradient')} other than 0, damping ratio {damping_ratio}: it needs "
        "at least one gradient, and a ratio above 0"
      )
    width = features.shape[1]
    over_rows = min(len(kept), MOST_ROWS) < width
    if over_rows and len(kept) > MOST_ROWS:
      kept = spread_among([str(row) for row in range(len(features))] if ids is None else ids, kept, MOST_ROWS)
    if over_rows:
      rows = (features[kept] / size[kept, None]).astype(features.dtype)
      matrix = products(rows, rows) / len(rows)
    else:
      matrix, rows = np.zeros((width, width)), np.zeros((0, width))
      for part in _blocks(kept):
        unit = features[part].astype(np.float64) / size[part, None]
        matrix += unit.T @ unit / len(kept)
    damping = damping_ratio * _largest_eigenvalue(matrix)
    matrix[np.diag_indices(len(matrix))] += damping
    return cls(rows, scipy.linalg.cholesky(matrix, lower=True, overwrite_a=True), damping, over_rows)

  def _image(self, x: np.ndarray) -> np.ndarray:
    """[m, W] -> what is multiplied beside the plain products, f64 [m, n or W]."""
    image = products(x, self.rows) / np.sqrt(len(self.rows)) if self.over_rows else x.astype(np.float64)
    return scipy.linalg.solve_triangular(self.factor, image.T, lower=True, overwrite_b=True).T

  def measured(self, rows: np.ndarray) -> "Measured":
    """Rows [m, W] with what the metric makes of them: most of the work of `cosines`, done once for a pool."""
    image = self._image(rows)
    inside = np.sum(image**2, axis=1)
    square = np.maximum((lengths(rows) ** 2 - inside) / self.damping if self.over_rows else inside, 0)
    return Measured(rows, image, square)

  def cosines(self, x: "np.ndarray | Measured", y: "np.ndarray | Measured") -> np.ndarray:
    """cos_M(x_i, y_j), float64 [len(x), len(y)] within [-1, 1]; 0 with a row of zeros.

    Args:
      x: [A, W].
      y: [B, W].
    """
    x, y = (side if isinstance(side, Measured) else self.measured(side) for side in (x, y))
    inside, scale = x.image @ y.image.T, np.sqrt(np.outer(x.square, y.square))
    inner = (products(x.rows, y.rows) - inside) / self.damping if self.over_rows else inside
    return np.clip(np.divide(inner, scale, out=np.zeros_like(scale), where=scale > 0), -1, 1)


def check_gradients(rows: np.ndarray, name: str) -> None:
  """Refuses projected gradients [n, W] of the set of that name that are not finite.

  Raises:
    UserError: tells how many.
  """
  bad = np.count_nonzero(~np.isfinite(rows.sum(axis=1, dtype=np.float64)))
  if bad:
    raise UserError(f"projected gradients of {how_many(bad, f'{name} example')} are not finite: look at their losses")


def spread_rows(ids: Sequence[str], count: int) -> np.ndarray:
  """At most `count` rows in growing order: those whose ids have the smallest hashes, in any order of reading the same.

  Args:
    ids: one a row.
    count: how many.
  """
  hashes = np.fromiter(map(_hash, ids), "S32", len(ids))
  return np.sort(np.argsort(hashes, kind="stable")[:count])


def spread_among(ids: Sequence[str], rows: np.ndarray, count: int) -> np.ndarray:
  """At most `count` of some rows, by `spread_rows` of their ids, in the order given.

  Args:
    ids: of all rows.
    rows: int, which of them may be taken.
    count: how many.
  """
  return rows[spread_rows(aggregation.ids_of(ids, rows), count)]


def _hash(name: str) -> bytes:
  return hashlib.sha256(f"whitened/{name}".encode("utf-8", "surrogatepass")).digest()


def _largest_eigenvalue(matrix: np.ndarray) -> float:
  if len(matrix) < 64:
    return float(np.linalg.eigvalsh(matrix)[-1])
  start = np.ones(len(matrix))  # a fixed start: the same numbers at every call
  return float(scipy.sparse.linalg.eigsh(matrix, k=1, v0=start, return_eigenvectors=False)[0])
