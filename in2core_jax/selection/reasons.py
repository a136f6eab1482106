"""Why each chosen example was taken, in words: made from the very numbers that a policy has chosen by. NumPy only.

Every function gives a `Reasons`: positions of the pool, in order of choice, -> a phrase for each.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from in2core_jax.errors import printable

Reasons = Callable[[np.ndarray], list[str]]
_NAME = 80  # characters of an id or a topic


def same(text: str) -> Reasons:
  """One phrase for all."""
  return lambda chosen: [text] * len(chosen)


def ranked(order: np.ndarray, by: str) -> Reasons:
  """Such as "rank 12 of 600 by influence".

  Args:
    order: int [P], all positions, best first.
    by: what the order is by, such as "by influence".
  """
  rank = np.empty(len(order), np.int64)
  rank[order] = np.arange(1, len(order) + 1)
  return lambda chosen: [f"rank {rank[position]:,} of {len(order):,} {by}" for position in chosen]


def ranked_in_topic(order: np.ndarray, topics: Sequence[str], by: str) -> Reasons:
  """Such as "rank 3 of 45 in its topic by influence".

  Args:
    order: int [P], all positions, best first.
    topics: P names.
    by: what the order is by.
  """
  _, codes, sizes = np.unique(np.asarray(topics, dtype=np.str_), return_inverse=True, return_counts=True)
  rank, seen = np.empty(len(order), np.int64), np.zeros(len(sizes), np.int64)
  for position in order:
    seen[codes[position]] += 1
    rank[position] = seen[codes[position]]
  return lambda chosen: [f"rank {rank[p]:,} of {sizes[codes[p]]:,} in its topic {by}" for p in chosen]


def in_turn(priority: np.ndarray, turns: np.ndarray, names: Sequence[str], of: str) -> Reasons:
  """Such as "in turn for query q17, round 2": for the priorities of `aggregation` where queries or topics take turns.

  Args:
    priority: [P], P for the first choice down to 1.
    turns: int [P], whose turn it is at each choice.
    names: of those that take turns.
    of: what these are, such as "query".
  """
  turn, shown = len(priority) - np.asarray(priority, np.int64), [_shown(name) for name in names]
  seen, rounds = [0] * len(names), []
  for mine in turns:
    seen[mine] += 1
    rounds.append(seen[mine])
  return lambda chosen: [f"in turn for {of} {shown[turns[turn[p]]]}, round {rounds[turn[p]]:,}" for p in chosen]


def closer(path: np.ndarray, what: str) -> Reasons:
  """Such as "brings the set's mean gradient closer", or that it does the least harm where every example left does some.

  Args:
    path: f64 [S], squared distance to the target after each choice, up to a constant.
    what: whose distance it is, such as "the set's mean gradient".
  """
  nearer = f"brings {what} closer", f"of those left, moves {what} away least"
  words = [nearer[0] if now < before else nearer[1] for before, now in itertools.pairwise(path)]
  words = [f"first choice: brings {what} closest", *words]
  return lambda chosen: words[: len(chosen)]


def repeated(reasons: Reasons, times: np.ndarray) -> Reasons:
  """Adds that an example repeats an earlier choice.

  Args:
    reasons: of the choice without that.
    times: int [P], how many examples that say the same come before each position.
  """
  told = "; a duplicate, taken when every other example was in"
  return lambda chosen: [
    word + told * bool(times[position]) for word, position in zip(reasons(chosen), chosen, strict=True)
  ]


def _shown(name: str) -> str:
  """An id or a topic as one short line."""
  text = printable(str(name)[:_NAME])
  return text or "(none)"
