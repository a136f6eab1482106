"""Greedy gradient matching on index rows: one pass over the pool for some hundred choices instead of one for each.

The rule is that of `selection.matching`: step m + 1 takes argmin_j 2 f_j.s + |f_j|^2 - 2 (m + 1) f_j.t, s the sum of
the m rows taken. |f_j|^2 is the whole squared length; f_j.s and f_j.t are those inside of the basis. A pass finds the
candidates that are best at the present sum; among them the rule is followed step by step, by their products with each
other; then comes the next pass, which reads only the rows that can have become candidates. With all examples as
candidates it is the rule itself.

Letters: N examples, r numbers of a row, c candidates, S chosen rows.
"""

import dataclasses

import numpy as np

from in2core_jax.index.best import keys_of
from in2core_jax.index.rows import BLOCK, SMALL, Rows, wide

CANDIDATES = 4096  # of a pass: their products with each other are 67 MB
STEPS, FIRST, SHARE = 512, 64, 8  # choices of a pass: an eighth of what is chosen, within 64 and 512
_MANY = 0.4  # of all rows: so many are read faster as they lie than one by one
_LONGER = 1.01  # a row inside of the basis, rounded to bfloat16, over its whole length: at most
_ROUNDING = 1e-5  # of products in float32, over the lengths of both factors


@dataclasses.dataclass(frozen=True)
class Pace:
  """How often the pool is read.

  Attributes:
    candidates: c, examples that the rule looks at between two passes.
    steps: choices between two passes, at most. While few are chosen they are fewer: each turns the sum further, and
      the best candidates are others sooner.
  """

  candidates: int = CANDIDATES
  steps: int = STEPS

  def steps_after(self, done: int) -> int:
    """Choices before the pool is read again, when `done` are made."""
    return min(self.steps, max(FIRST, done // SHARE))


def greedy_matching(
  rows: Rows,
  target: np.ndarray,
  count: int,
  places: np.ndarray,
  pace: Pace | None = None,
) -> np.ndarray:
  """The set whose mean gradient is closest to a target's, greedily.

  Args:
    rows: of N examples.
    target: f64 [r], in the basis.
    count: S.
    places: int [N], each example's place among ties; -1 for those that take no part.
    pace: how often the pool is read; `Pace()` when None.

  Returns:
    int64 [S], rows in order of choice.
  """
  pace = pace or Pace()
  square, free = rows.values("square"), places >= 0
  least = _Least(rows, square)
  total, chosen, done = np.zeros(rows.width), np.empty(count, np.int64), 0
  while done < count:
    steps = min(pace.steps_after(done), count - done)
    found = least.of(2 * (total - (done + 1) * target), np.flatnonzero(free), places, pace.candidates)
    found = found[np.argsort(places[found])]
    numbers = wide(rows.stored("gradients", found)).astype(np.float64 if len(rows) <= CANDIDATES else np.float32)
    picked = _among(numbers, square[found], (total, target), done, steps)
    chosen[done : done + len(picked)], free[found[picked]] = found[picked], False
    total += numbers[picked].sum(axis=0, dtype=np.float64)
    done += len(picked)
  return chosen


class _Least:
  """The rows of the least distances d_j(u) = a_j.u + |f_j|^2, for one direction u after the other.

  From u to w no distance falls by more than |a_j| |u - w|. So a row whose distance was large is not read again until it
  can have become one of the least: what is found is the same, up to rounding, as if all rows were read each time.
  """

  def __init__(self, rows: Rows, square: np.ndarray):
    """Nothing is read yet."""
    self._rows, self._square = rows, square
    self._length = _LONGER * np.sqrt(square)
    self._seen = np.empty(len(rows), np.float32)  # each row's distance when it was last read
    self._when = np.zeros(len(rows), np.int32)  # at which of these directions
    self._directions: list[np.ndarray] = []

  def of(self, along: np.ndarray, left: np.ndarray, places: np.ndarray, most: int) -> np.ndarray:
    """At most `most` rows of `left`, ties by place, in any order; `along` is u, f64 [r]."""
    if most >= len(left):
      return left
    self._directions.append(along)
    if len(self._directions) == 1:
      self._read_all()
      return _best(self._seen, places, left, most)
    moved = np.linalg.norm(np.stack(self._directions) - along, axis=1).astype(np.float32)
    slack = np.float32(_ROUNDING * np.linalg.norm(along))
    low = self._seen[left] - self._length[left] * (moved[self._when[left]] + slack)
    near = left[np.argpartition(low, most)[:most]]
    self._read(near, along)
    cut = self._seen[near].max()  # the least distances are no larger than this
    may = left[low <= cut]
    self._read(may[self._when[may] != len(self._directions) - 1], along)
    return _best(self._seen, places, left[low <= cut], most)

  def _read(self, some: np.ndarray, along: np.ndarray) -> None:
    """Distances of some rows, or of all where these are many: those are read in the order in which they lie."""
    if len(some) > _MANY * len(self._rows):
      self._read_all()
      return
    along = along.astype(np.float32)
    for first in range(0, len(some), BLOCK):
      part = some[first : first + BLOCK]
      self._seen[part] = wide(self._rows.stored("gradients", part)) @ along + self._square[part]
    self._when[some] = len(self._directions) - 1

  def _read_all(self) -> None:
    along = self._directions[-1].astype(np.float32)
    for own, numbers in self._rows.gradients(SMALL):
      self._seen[own] = numbers @ along
    self._seen += self._square
    self._when[:] = len(self._directions) - 1


def _best(distance: np.ndarray, places: np.ndarray, group: np.ndarray, most: int) -> np.ndarray:
  """The rows of a group of the least distances, ties by place, in any order."""
  if most >= len(group):
    return group
  keys = keys_of(-distance[group], places[group])
  return group[np.argpartition(keys, len(keys) - most)[len(keys) - most :]]


def _among(numbers: np.ndarray, square: np.ndarray, sums, done: int, steps: int) -> np.ndarray:
  """The rule, step by step, among some candidates [c, r] in the order of their places: which of them, in order."""
  total, target = sums
  gram = numbers @ numbers.T
  overlap = (numbers @ total.astype(numbers.dtype)).astype(np.float64)
  towards = (numbers @ target.astype(numbers.dtype)).astype(np.float64)
  norm, free = square.astype(np.float64), np.ones(len(numbers), bool)
  picked = []
  for step in range(min(steps, len(numbers))):
    distance = 2 * overlap + norm - 2 * (done + step + 1) * towards
    best = int(np.argmin(np.where(free, distance, np.inf)))
    picked.append(best)
    free[best] = False
    overlap += gram[best]
  return np.asarray(picked, np.int64)
