"""Cosines of index rows as the policy `hybrid` takes them: in metrics of r numbers, whatever the size of the pool.

  gradients   <x, y>_M = a_x . (C + d I)^-1 a_y,  |x|_M^2 = a_x . (C + d I)^-1 a_x + (|S g_x|^2 - |a_x|^2) / d
  hidden      cosine of (C_v + d_v I)^-1/2 (x_v - mean_v), |.|^2 with the part outside of the basis over d_v likewise

C is the second moment of the pool's unit gradients, C_v the covariance of a view of its hidden states. Outside of the
basis the metrics are taken to be 1 / d and 1 / d_v, because the directions that the pool shares lie inside. With a
basis that misses nothing these are the numbers of `selection.whitening` and `selection.hybrid`.

The mean of the cosines is one product: the metric goes to the queries' side, lengths to the rows' side.
"""

import dataclasses

import numpy as np
import scipy.linalg

from in2core_jax.errors import UserError
from in2core_jax.index.rows import NUMBERS, Block, Rows
from in2core_jax.selection.hybrid import EMBEDDING_DAMPING, smoothed_by
from in2core_jax.selection.whitening import DAMPING_RATIO

_MOST_ROUNDED = 2.0**-7 * 1.01
_ROUNDED = 4 * 0.0033  # four standard deviations
KINDS = {"hybrid": (True, True), "whitened_cosine": (True, False), "whitened_embedding": (False, True)}


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
  """The metric of one part of a row.

  Attributes:
    center: f64 [d], taken off first.
    root: f64 [d, d], x -> x root is what is multiplied: root root^T = (C + d I)^-1.
    damping: absolute; 0 for a part that tells nothing apart, whose cosines are 0.
  """

  center: np.ndarray
  root: np.ndarray
  damping: float

  @classmethod
  def of(cls, moment: np.ndarray, ratio: float, center: np.ndarray | None = None) -> "Part":
    """From the second moment, or the covariance about a center, f64 [d, d]."""
    center = np.zeros(len(moment)) if center is None else center
    values, directions = scipy.linalg.eigh(moment)
    largest = values[-1] if len(values) else 0.0
    if not largest > 0:
      return cls(center, np.zeros_like(moment), 0.0)
    damping = ratio * largest
    return cls(center, directions / np.sqrt(np.maximum(values, 0) + damping), damping)

  def images(self, numbers: np.ndarray, square: np.ndarray, rounded: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Rows -> (images [n, d], 1 / length of each, 0 where it has none); in the dtype of the rows.

    Args:
      numbers: [n, d]. square: [n], whole squared lengths.
      rounded: whether the numbers were bfloat16.
    """
    if not self.damping:
      return np.zeros_like(numbers), np.zeros(len(numbers), numbers.dtype)
    inside = np.einsum("nd,nd->n", numbers, numbers)
    image = (numbers - self.center.astype(numbers.dtype)) @ self.root.astype(numbers.dtype)
    outside = np.maximum(square - inside, 0) * _beyond_rounding(numbers, square, inside, rounded)
    whole = np.einsum("nd,nd->n", image, image) + outside / numbers.dtype.type(self.damping)
    return image, np.divide(1, np.sqrt(whole), out=np.zeros_like(whole), where=whole > 0)


def _beyond_rounding(numbers: np.ndarray, square: np.ndarray, inside: np.ndarray, rounded: bool) -> np.ndarray:
  """False where a difference of squares is rounding: of float32, and of numbers that were bfloat16.

  A number x rounded to bfloat16 errs by 0.0017 |x| (one standard deviation), so |a|^2 by 0.0033 sqrt(sum x^4), and by
  2^-7 |a|^2 at most.
  """
  apart = square - inside
  beyond = apart > 1e-6 * square
  if rounded:
    unsure = np.flatnonzero(beyond & (apart <= _MOST_ROUNDED * square))
    beyond[unsure] = apart[unsure] > _ROUNDED * np.sqrt(np.sum(numbers[unsure] ** 4, axis=1))
  return beyond


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
  """Queries, ready to be multiplied with rows.

  Attributes:
    unit: for each part of a row, f64 [Q, d]: images of length 1 (0 where a query has none).
  """

  unit: tuple[np.ndarray, ...]

  def averaged(self, weights: np.ndarray) -> "Asked":
    """Weighted sums of the queries, weights [G, Q]: cosines with them are the sums of the queries' cosines."""
    return Asked(tuple(weights @ unit for unit in self.unit))

  def among(self) -> np.ndarray:
    """Mean cosine of every pair of queries, f64 [Q, Q]."""
    return sum(unit @ unit.T for unit in self.unit) / len(self.unit)

  def __len__(self) -> int:
    return len(self.unit[0])


@dataclasses.dataclass(frozen=True, eq=False)
class IndexMetric:
  """The metrics of a pool; make one with `fit`.

  Attributes:
    parts: of the gradients, and of each view of the hidden states; those that the policy looks at.
    kind: a word of `KINDS`.
  """

  parts: tuple[Part, ...]
  kind: str

  @classmethod
  def fit(cls, rows: Rows, counted: np.ndarray, kind: str) -> "IndexMetric":
    """The metric of a pool, in one pass over its rows.

    Args:
      rows: of N examples.
      counted: bool [N], which examples make it: those with a response, of copies the first.
      kind: a word of `KINDS`.

    Raises:
      UserError: no row that is not 0, or no hidden states where the policy looks at them.
    """
    gradients, hidden = KINDS[kind]
    if hidden and not rows.views:
      raise UserError(
        f"policy {kind} looks at hidden states, which this index does not hold: make it with --index_hidden above 0, "
        "or take --policy=whitened_cosine"
      )
    moments = _Moments(rows.width if gradients else 0, rows.segments[0]["hidden"].shape[1:] if hidden else (0, 0))
    for block in rows.blocks():
      moments.add(block.take(counted[block.rows]))
    if gradients and not moments.count:
      raise UserError("the index has no gradient that is not 0: there is nothing to compare queries with")
    return cls(tuple(moments.parts()), kind)

  def images(self, block: Block) -> list[tuple[np.ndarray, np.ndarray]]:
    """What each part makes of a block."""
    gradients, hidden = KINDS[self.kind]
    pairs = [(block.gradients, block.square)] if gradients else []
    pairs += [(block.hidden[:, v], block.hidden_square[:, v]) for v in range(block.hidden.shape[1])] if hidden else []
    return [part.images(*pair, block.rounded) for part, pair in zip(self.parts, pairs, strict=True)]

  def asked(self, queries: Block) -> Asked:
    """Queries, for `similarity`."""
    numbers = (np.asarray(getattr(queries, name), np.float64) for name in NUMBERS)
    exact = Block(queries.rows, *numbers, queries.rounded)
    return Asked(tuple(image * scale[:, None] for image, scale in self.images(exact)))

  def similarity(self, asked: Asked, block: Block) -> np.ndarray:
    """Mean cosine of every query with every row of a block, f32 [Q, n]."""
    total = np.zeros((len(asked), len(block.rows)), block.gradients.dtype)
    for unit, (image, scale) in zip(asked.unit, self.images(block), strict=True):
      total += unit.astype(image.dtype) @ (image * scale[:, None]).T
    return total / total.dtype.type(len(asked.unit))


def smooth(asked: Asked) -> Asked:
  """The queries as `hybrid` lets them speak: each together with those most like it."""
  return asked.averaged(smoothed_by(asked.among()))


class _Moments:
  """Sums over the pool that the metrics are made of, float64."""

  def __init__(self, width: int, hidden: tuple[int, int]):
    views, size = hidden
    self.count = self.seen = 0
    self._gradients = np.zeros((width, width))
    self._sum, self._hidden = np.zeros((views, size)), np.zeros((views, size, size))

  def add(self, block: Block) -> None:
    """Counts some rows in."""
    if len(self._gradients):
      kept = block.square > 0
      unit = block.gradients[kept] / np.sqrt(block.square[kept])[:, None]
      self._gradients += unit.T @ unit
      self.count += len(unit)
    for view in range(len(self._sum)):
      self._sum[view] += block.hidden[:, view].sum(axis=0, dtype=np.float64)
      self._hidden[view] += block.hidden[:, view].T @ block.hidden[:, view]
    self.seen += len(block.rows)

  def parts(self) -> list[Part]:
    """The metric of the gradients, where there are any, then of each view of the hidden states."""
    found = [Part.of(self._gradients / self.count, DAMPING_RATIO)] if len(self._gradients) else []
    for total, moment in zip(self._sum, self._hidden, strict=True):
      mean = total / self.seen
      found.append(Part.of(moment / self.seen - np.outer(mean, mean), EMBEDDING_DAMPING, mean))
    return found
