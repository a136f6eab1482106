"""Which examples share a row, and which rows a batch: best-fit packing, and plans in flat arrays."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# Attention over a row costs its length for every token. Up to here that is little beside the layer's matrices; longer
# examples go into rows of their own length class, so that short ones do not pay for them.
SHORT_ROW = 512

# The rows of each group of a batch, and the examples of each row.
Cells = list[list[list[int]]]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
  """Distributes items over as few bins as best-fit decreasing finds (at most 11/9 of the optimum + 1, Johnson 1973).

  Args:
    lengths: size of each item, at most `capacity`.
    capacity: of a bin.

  Returns:
    For each bin its items' indices, in order of placement; equal lengths keep their order.
  """
  order, chosen = placed(np.asarray(lengths), capacity)
  bins: list[list[int]] = [[] for _ in range(int(chosen.max(initial=-1)) + 1)]
  for item, number in zip(order.tolist(), chosen.tolist(), strict=True):
    bins[number].append(item)
  return bins


def placed(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
  """Best-fit decreasing: (items in order of placement, the bin of each), int32 [n] both.

  The bins with so much free space are a heap, and which spaces there are is one number's bits: an item takes the bin
  with the least space that holds it, of equal ones the first.
  """
  capacity = int(capacity)
  order = np.argsort(-lengths.astype(np.int32), kind="stable").astype(np.int32)
  chosen, least, count = np.empty(len(order), np.int32), int(lengths.min(initial=capacity)), 0
  room: dict[int, list[int]] = {}
  there = 0  # bit f: a bin has f free
  for start in range(0, len(order), 2**16):
    for place, length in enumerate(lengths[order[start : start + 2**16]].tolist(), start):
      fits = there >> length
      if fits:
        free = length + (fits & -fits).bit_length() - 1
        number = heapq.heappop(room[free])
        if not room[free]:
          there ^= 1 << free
      else:
        free, number, count = capacity, count, count + 1
      left = free - length
      chosen[place] = number
      if left >= least:  # nothing fits into the others
        heapq.heappush(room.setdefault(left, []), number)
        there |= 1 << left
  return order, chosen


def pack(members: np.ndarray, lengths: np.ndarray, capacity: int) -> list[list[int]]:
  """Rows of at most `capacity` tokens that hold the examples `members`; lengths are those of the whole data set."""
  return [[int(members[item]) for item in row] for row in best_fit(lengths[members], capacity)]


def row_lengths(lengths: np.ndarray, multiple: int = 16) -> dict[int, np.ndarray]:
  """Row length of each length class -> the examples in it: up to `SHORT_ROW`, and a class for each doubling above.

  A row is as long as the class's longest example, rounded up to `multiple`.
  """
  lengths = np.asarray(lengths)
  known = np.arange(lengths.max(initial=0) + 1)
  step_of = np.ceil(np.log2(np.maximum(known, SHORT_ROW) / SHORT_ROW)).astype(np.int8)
  doublings = step_of[lengths]
  classes = (np.flatnonzero(doublings == step) for step in np.unique(doublings))
  return {-(-int(lengths[members].max()) // multiple) * multiple: members for members in classes}


class FlatCells(NamedTuple):
  """Examples in rows of one length, and rows in cells, without an object for each.

  Attributes:
    length: of the rows.
    examples: int32 [N], those of the first row first.
    row_ends: int32 [W], where each row ends in `examples`.
    cell_ends: int32 [C], where each cell ends in `row_ends`.
  """

  length: int
  examples: np.ndarray
  row_ends: np.ndarray
  cell_ends: np.ndarray

  def cell(self, number: int) -> list[list[int]]:
    """The rows of one cell."""
    first, last = (int(self.cell_ends[number - 1]) if number else 0), int(self.cell_ends[number])
    ends = [int(self.row_ends[first - 1]) if first else 0, *self.row_ends[first:last].tolist()]
    return [self.examples[start:end].tolist() for start, end in itertools.pairwise(ends)]


class FlatPlan(Sequence):
  """The batches of a plan, (shape or row length, cells) each, made when they are asked for."""

  def __init__(self, groups: int, parts: Sequence[FlatCells], shapes: Sequence[Any] | None = None):
    self._groups, self._parts, self._shapes = groups, parts, shapes
    self._ends = np.cumsum([len(part.cell_ends) // groups for part in parts], dtype=np.int64)

  def with_shapes(self, shapes: Sequence[Any]) -> FlatPlan:
    """The same with the shape of each batch in place of the length of its rows."""
    return FlatPlan(self._groups, self._parts, shapes)

  def __len__(self) -> int:
    return int(self._ends[-1]) if len(self._ends) else 0

  def __getitem__(self, index):
    if isinstance(index, slice):
      return PlanPart(self, range(len(self))[index])
    index = range(len(self))[index]
    number = int(np.searchsorted(self._ends, index, side="right"))
    part, first = self._parts[number], index - (int(self._ends[number - 1]) if number else 0)
    cells = [part.cell(first * self._groups + group) for group in range(self._groups)]
    return (part.length if self._shapes is None else self._shapes[index]), cells

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Sequence) and [*self] == [*other]

  __hash__ = None


class PlanPart(Sequence):
  """Some batches of a plan, made when they are asked for: shards of a large plan hold no object for an example."""

  def __init__(self, plan: FlatPlan, batches: range):
    self._plan, self._batches = plan, batches

  def __len__(self) -> int:
    return len(self._batches)

  def __getitem__(self, index):
    found = self._batches[index]
    return PlanPart(self._plan, found) if isinstance(found, range) else self._plan[found]

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Sequence) and [*self] == [*other]

  __hash__ = None
