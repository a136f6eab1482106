"""Greedy gradient matching on index rows: one pass over the pool for some hundred choices instead of one for each.

The rule is that of `selection.matching`: step m + 1 takes argmin_j 2 f_j.s + |f_j|^2 - 2 (m + 1) f_j.t, s the sum of
the m rows taken. |f_j|^2 is the whole squared length; f_j.s and f_j.t are those inside of the basis. A pass finds the
candidates that are best at the present sum; among them the rule is followed step by step, by their products with each
other; then comes the next pass. With all examples as candidates it is the rule itself.

Letters: N examples, r numbers of a row, c candidates, S chosen rows.
"""

import dataclasses

import numpy as np

from in2core_jax.index.best import keys_of
from in2core_jax.index.rows import Rows, wide

CANDIDATES = 4096  # of a pass: their products with each other are 67 MB
STEPS = 512  # choices of a pass


@dataclasses.dataclass(frozen=True)
class Pace:
  """How often the pool is read.

  Attributes:
    candidates: c, examples that the rule looks at between two passes.
    steps: choices between two passes.
  """

  candidates: int = CANDIDATES
  steps: int = STEPS


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
  total, chosen, done = np.zeros(rows.width), np.empty(count, np.int64), 0
  while done < count:
    steps = min(pace.steps, count - done)
    distance = _distances(rows, 2 * (total - (done + 1) * target)) + square
    left = np.flatnonzero(free)
    found = _best(distance, places, left, pace.candidates)
    found = found[np.argsort(places[found])]
    numbers = wide(rows.stored("gradients", found)).astype(np.float64 if len(rows) <= CANDIDATES else np.float32)
    picked = _among(numbers, square[found], (total, target), done, steps)
    chosen[done : done + len(picked)], free[found[picked]] = found[picked], False
    total += numbers[picked].sum(axis=0, dtype=np.float64)
    done += len(picked)
  return chosen


def _distances(rows: Rows, along: np.ndarray) -> np.ndarray:
  """Products of all rows with one vector, f32 [N]: the one pass over the pool."""
  found, along = np.empty(len(rows), np.float32), along.astype(np.float32)
  for own, numbers in rows.gradients():
    found[own] = numbers @ along
  return found


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
