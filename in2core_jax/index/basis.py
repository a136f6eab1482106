"""The few directions that an index keeps of gradients and of hidden states.

  queries   V [W, r], orthonormal: the leading right singular vectors of the queries' unit gradients (at most three
            quarters of r), the mean of a sample of the pool, then the leading directions of what is left of the
            sample's unit gradients
  generic   a sparse sign projection of W to r numbers, E[<x P, y P>] = <x, y>: for queries that nobody knows yet

With `queries`, inner products with these queries are those of the whole sketch when Q is at most three quarters of r;
with others they miss what lies outside of the basis, whose size is known. Hidden states have a basis for each view: of
queries and sample less the sample's mean.

Letters: W numbers of a sketched gradient, r of a row, Q queries, n examples of the sample, D width, V views, h numbers
of a view.
"""

import dataclasses
from typing import Any

import numpy as np

from in2core_jax.errors import UserError
from in2core_jax.index.kinds import NONZEROS
from in2core_jax.selection.whitening import products

QUERIES_SHARE = 0.75  # of the directions, at most, follow the queries
_RANK = 1e-10  # of the largest squared singular value: what is smaller is rounding


@dataclasses.dataclass(frozen=True, eq=False)
class Raw:
  """Examples before any basis.

  Attributes:
    gradients: sketched ones, f32 [n, W].
    hidden: views of the last hidden states, f32 [n, V, D].
    loss: f32 [n].
  """

  gradients: np.ndarray
  hidden: np.ndarray
  loss: np.ndarray

  def take(self, rows: np.ndarray) -> "Raw":
    """Some of them."""
    return Raw(self.gradients[rows], self.hidden[rows], self.loss[rows])


@dataclasses.dataclass(frozen=True, eq=False)
class Basis:
  """Made by `make`.

  Attributes:
    kind: a word of `kinds.KINDS`.
    gradients: of kind queries f32 [W, r]; of kind generic int32 [NONZEROS, W]: where each number goes and, by its sign,
      how (b stands for +b, -b - 1 for -b).
    size: r.
    hidden: f32 [V, D, h].
    center: f32 [V, D], taken off the hidden states.
  """

  kind: str
  gradients: np.ndarray
  size: int
  hidden: np.ndarray
  center: np.ndarray

  def arrays(self) -> dict[str, np.ndarray]:
    """For a file; `of_arrays` reads them."""
    return {name: np.asarray(getattr(self, name)) for name in ("gradients", "size", "hidden", "center")}

  @classmethod
  def of_arrays(cls, kind: str, arrays: dict[str, np.ndarray]) -> "Basis":
    """Inverse of `arrays`."""
    return cls(kind, arrays["gradients"], int(arrays["size"]), arrays["hidden"], arrays["center"])


def make(kind: str, queries: Raw, sample: Raw, size: int, hidden_size: int, seed: int) -> tuple[Basis, dict[str, Any]]:
  """A basis, and what is known of it.

  Args:
    kind: a word of `kinds.KINDS`.
    queries: of the evaluation set; none for generic.
    sample: of the pool.
    size: r; fewer where queries and sample span fewer.
    hidden_size: h, at most; 0 for no hidden states.
    seed: of the generic projection.

  Raises:
    UserError: nothing in them that is not 0.
  """
  if kind == "generic":
    gradients = generic_projection(sample.gradients.shape[1], size, seed)
    facts: dict[str, Any] = {}
  else:
    gradients, facts = _directions(queries.gradients, sample.gradients, size)
    size = gradients.shape[1]
  views = [_view(queries.hidden[:, v], sample.hidden[:, v], hidden_size) for v in range(sample.hidden.shape[1])]
  width = min([found.shape[1] for found, _ in views], default=0)
  hidden = np.stack([found[:, :width] for found, _ in views]) if width else np.zeros((0, 0, 0), np.float32)
  center = np.stack([mean for _, mean in views]) if width else np.zeros((0, 0), np.float32)
  facts |= {"size": size, "hidden_size": width, "queries": len(queries.gradients), "sample": len(sample.gradients)}
  return Basis(kind, gradients, size, hidden, center), facts


def generic_projection(width: int, size: int, seed: int) -> np.ndarray:
  """Where each of W numbers goes, `NONZEROS` times, each time into a block of its own: int32 [NONZEROS, W]."""
  if size % NONZEROS:
    raise UserError(f"--index_size={size} of a generic index must be a multiple of {NONZEROS}")
  rng, block = np.random.default_rng((seed, 28)), size // NONZEROS
  where = rng.integers(0, block, (NONZEROS, width)) + block * np.arange(NONZEROS)[:, None]
  return np.where(rng.integers(0, 2, where.shape) == 1, where, -where - 1).astype(np.int32)


def _directions(queries: np.ndarray, sample: np.ndarray, size: int) -> tuple[np.ndarray, dict[str, Any]]:
  """Orthonormal f32 [W, r'], r' at most `size`, and the shares of unit gradients that it keeps."""
  asked, pool, mean = _unit(queries), _unit(sample), sample.mean(axis=0, dtype=np.float64)
  found = _leading(asked, max(1, int(QUERIES_SHARE * size)) if len(pool) else size)
  if np.linalg.norm(mean) > 0:
    found = _joined(found, (mean / np.linalg.norm(mean)).astype(np.float32)[None], size)
  found = _joined(found, pool, size)
  if found.shape[1] < size:  # a small pool: what is left of the queries
    found = _joined(found, asked, size)
  if not found.shape[1]:
    raise UserError("neither queries nor the sample of the pool have a gradient that is not 0: look at the data")
  return found, {"kept_of_queries": _kept(asked, found), "kept_of_sample": _kept(pool, found)}


def _joined(basis: np.ndarray, rows: np.ndarray, size: int) -> np.ndarray:
  """The basis [W, k] with the leading directions of what rows [n, W] have outside of it, `size` at most in all."""
  if basis.shape[1] >= size or not len(rows):
    return basis
  left = rows
  for _ in range(2):  # once more against rounding
    left = left - (left @ basis) @ basis.T
  # Of rows of length 1, rests that are rounding are no directions.
  left = left[np.linalg.norm(left, axis=1) > 1e-5 * np.linalg.norm(rows, axis=1)]
  more = _leading(left, size - basis.shape[1])
  whole = np.linalg.qr(np.concatenate([basis, more], axis=1))[0]
  return np.ascontiguousarray(whole.astype(np.float32))


def _leading(rows: np.ndarray, count: int) -> np.ndarray:
  """The leading right singular vectors of rows [n, W], at most `count`, f32 [W, k]; by the rows' products."""
  if not len(rows):
    return np.zeros((rows.shape[1], 0), np.float32)
  values, vectors = np.linalg.eigh(products(rows, rows))
  values, vectors = values[::-1], vectors[:, ::-1]
  kept = min(count, int(np.count_nonzero(values > max(values[0], 0) * _RANK)))
  found = rows.T @ (vectors[:, :kept] / np.sqrt(values[:kept])).astype(np.float32)
  return np.linalg.qr(found)[0].astype(np.float32)


def _unit(rows: np.ndarray) -> np.ndarray:
  """Rows of length 1; those of zeros are left out."""
  lengths = np.linalg.norm(rows, axis=1, keepdims=True)
  kept = lengths[:, 0] > 0
  return rows[kept] / lengths[kept]


def _kept(unit: np.ndarray, basis: np.ndarray) -> float | None:
  """Mean share of the squared length of unit rows inside of the basis."""
  return float(np.mean(np.sum((unit @ basis) ** 2, axis=1))) if len(unit) else None


def _view(queries: np.ndarray, sample: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
  """(f32 [D, h], mean f32 [D]) of one view of the hidden states."""
  mean = sample.mean(axis=0, dtype=np.float64).astype(np.float32)
  if not size:
    return np.zeros((sample.shape[1], 0), np.float32), mean
  if size >= sample.shape[1]:
    return np.eye(sample.shape[1], dtype=np.float32), mean
  found = _leading(sample - mean, size // 2)
  return _joined(_joined(found, queries - mean, max(size * 3 // 4, 1)), sample - mean, size), mean
