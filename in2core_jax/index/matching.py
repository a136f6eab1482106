"""Greedy gradient matching on index rows: one pass over the pool for some hundred choices instead of one for each.

The rule is that of `selection.matching`: step m + 1 takes argmin_j 2 f_j.s + |f_j|^2 - 2 (m + 1) f_j.t, s the sum of
the m rows taken. |f_j|^2 is the whole squared length; f_j.s and f_j.t are those inside of the basis. A pass finds the
candidates that are best at the present sum; among them the rule is followed step by step, by their products with each
other; then comes the next pass. With all examples as candidates it is the rule itself.

Letters: N examples, r numbers of a row, c candidates, S chosen rows.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from in2core_jax.index.best import keys_of
from in2core_jax.index.rows import Rows
from in2core_jax.selection.matching import Shares

CANDIDATES = 4096  # of a pass: their products with each other are 134 MB
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
  topics: Sequence[str] | None = None,
  pace: Pace | None = None,
) -> np.ndarray:
  """The set whose mean gradient is closest to a target's, greedily.

  Args:
    rows: of N examples.
    target: f64 [r], in the basis.
    count: S.
    places: int [N], each example's place among ties; -1 for those that take no part.
    topics: N names; then each step is held to the topics most behind their shares, as in `selection.matching`.
    pace: how often the pool is read; `Pace()` when None.

  Returns:
    int64 [S], rows in order of choice.
  """
  pace = pace or Pace()
  pool = np.flatnonzero(places >= 0)
  pool = pool[np.argsort(places[pool], kind="stable")]
  square = rows.values("square")
  codes = None if topics is None else np.unique(np.asarray(topics, np.str_)[pool], return_inverse=True)[1]
  shares = None if codes is None else Shares(codes)
  code_of = None
  if codes is not None:
    code_of = np.full(len(rows), -1, np.int64)
    code_of[pool] = codes
  free = places >= 0
  total, chosen = np.zeros(rows.width), np.empty(count, np.int64)
  done = 0
  while done < count:
    steps = min(pace.steps, count - done)
    found = _candidates(rows, 2 * (total - (done + 1) * target), square, free, places, pace.candidates, code_of)
    picked = _among(rows, found, square, (total, target), done, steps, (shares, code_of))
    chosen[done : done + len(picked)] = picked
    free[picked] = False
    total += rows.take(picked).gradients.sum(axis=0, dtype=np.float64)
    done += len(picked)
  return chosen


def _candidates(rows: Rows, along: np.ndarray, square, free, places, count: int, code_of) -> np.ndarray:
  """The free rows of the least distance at the present sum, by place; of every topic its share."""
  distance = np.empty(len(rows), np.float32)
  along = along.astype(np.float32)
  for own, numbers in rows.gradients():
    distance[own] = numbers @ along
  distance += square
  left = np.flatnonzero(free)
  if len(left) <= count:
    return left[np.argsort(places[left])]
  groups = [left] if code_of is None else [left[code_of[left] == code] for code in np.unique(code_of[left])]
  kept = []
  for group in groups:
    most = len(group) if len(group) <= 64 else max(64, -(-count * len(group) // len(left)))
    keys = keys_of(-distance[group], places[group])
    kept.append(group if most >= len(group) else group[np.argpartition(keys, len(keys) - most)[len(keys) - most :]])
  found = np.concatenate(kept)
  return found[np.argsort(places[found])]


def _among(rows: Rows, found, square, sums, done: int, steps: int, by_topic) -> np.ndarray:
  """The rule, step by step, among some candidates."""
  (total, target), (shares, code_of) = sums, by_topic
  numbers = rows.take(found).gradients.astype(np.float64 if len(rows) <= CANDIDATES else np.float32)
  gram = numbers @ numbers.T
  overlap = (numbers @ total.astype(numbers.dtype)).astype(np.float64)
  towards = (numbers @ target.astype(numbers.dtype)).astype(np.float64)
  norm, free = square[found].astype(np.float64), np.ones(len(found), bool)
  picked = []
  for step in range(min(steps, len(found))):
    allowed = free if shares is None else free & shares.next_codes()[code_of[found]]
    if not allowed.any():  # of a topic whose candidates are used up: another pass finds more
      break
    distance = 2 * overlap + norm - 2 * (done + step + 1) * towards
    best = int(np.argmin(np.where(allowed, distance, np.inf)))
    picked.append(found[best])
    free[best] = False
    overlap += gram[best]
    if shares is not None:
      shares.take_code(code_of[found[best]])
  return np.asarray(picked, np.int64)
