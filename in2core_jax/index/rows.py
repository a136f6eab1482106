"""What rules read of an index: a few numbers for each example, in blocks, so that memory does not grow with the pool.

  gradients  a_i = V^T S g_i, r numbers of the sketched gradient in the basis (`basis`); bfloat16 on disk
  square     |S g_i|^2, so that what lies outside of the basis is known in size
  hidden     V views of the last hidden states less the pool's, h numbers each in a basis of their own
  hidden_square  their whole squared lengths
  loss       of the example

Numbers are bfloat16 where they lie and float32 where they are multiplied. Letters: N examples of the pool, n of a
block, r and h numbers of a row, V views, Q queries.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np

BLOCK = 8192  # rows that are float32 at the same time: 16 MB at r = 512
SMALL = 512  # the same where each is multiplied with one vector: they stay in a core's cache
NARROW = np.dtype(ml_dtypes.bfloat16)

Arrays = Mapping[str, np.ndarray]
NUMBERS = ("gradients", "square", "hidden", "hidden_square")  # of a block, in the order of its fields


def wide(numbers: np.ndarray) -> np.ndarray:
  """bfloat16 -> float32 by a shift of the bits, several times as fast as a cast; float32 stays."""
  if numbers.dtype != NARROW:
    return numbers
  return np.left_shift(numbers.view(np.uint16), 16, dtype=np.uint32).view(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
  """Some rows of an index.

  Attributes:
    rows: int64 [n], which examples of the pool.
    gradients: f32 [n, r]. square: f32 [n].
    hidden: f32 [n, V, h]. hidden_square: f32 [n, V].
    rounded: whether numbers, but not squares, were bfloat16.
  """

  rows: np.ndarray
  gradients: np.ndarray
  square: np.ndarray
  hidden: np.ndarray
  hidden_square: np.ndarray
  rounded: bool = False

  @classmethod
  def of(cls, rows: np.ndarray, arrays: Arrays, where: slice | np.ndarray) -> "Block":
    """The rows `where` of some arrays as they are stored."""
    numbers = (wide(arrays[name][where]) for name in NUMBERS)
    return cls(rows, *numbers, arrays["gradients"].dtype == NARROW)

  def take(self, where: np.ndarray) -> "Block":
    """Some of them, by mask or position."""
    return Block(*(getattr(self, name)[where] for name in ("rows", *NUMBERS)), self.rounded)


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
  """The pool's rows, wherever they lie.

  Attributes:
    segments: pieces of the index in order, each with the arrays that the module describes.
    position: int64 [N], where each example of the pool is found, counted over all segments; copies share one.
  """

  segments: Sequence[Arrays]
  position: np.ndarray

  @classmethod
  def in_memory(cls, **arrays: np.ndarray) -> "Rows":
    """Rows of arrays, one for each example; without hidden states where none are given."""
    size = len(arrays["gradients"])
    empty = {"hidden": np.zeros((size, 0, 0), np.float32), "hidden_square": np.zeros((size, 0), np.float32)}
    return cls([empty | arrays], np.arange(size))

  def __len__(self) -> int:
    return len(self.position)

  @property
  def width(self) -> int:
    """r."""
    return self.segments[0]["gradients"].shape[1]

  @property
  def views(self) -> int:
    """V; 0 where no hidden states are kept."""
    return self.segments[0]["hidden"].shape[1]

  def blocks(self) -> Iterator[Block]:
    """All rows once, in the order in which they lie, at most `BLOCK` at a time."""
    for rows, segment, where in self._pieces():
      yield Block.of(rows, segment, where)

  def gradients(self, most: int = BLOCK) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows, f32 [n, r]) of all of them, at most so many at a time: for rules that read nothing else, many times."""
    for rows, segment, where in self._pieces(most):
      yield rows, wide(segment["gradients"][where])

  def values(self, name: str) -> np.ndarray:
    """One number of each example, such as its loss or its square: f32 [N]."""
    return np.concatenate([segment[name] for segment in self.segments]).astype(np.float32)[self.position]

  @functools.cached_property
  def _lying(self) -> tuple[np.ndarray, np.ndarray]:
    """(examples in the order in which their rows lie, where these are)."""
    order = np.argsort(self.position, kind="stable")
    return order, self.position[order]

  def _pieces(self, most: int = BLOCK) -> Iterator[tuple[np.ndarray, Arrays, slice | np.ndarray]]:
    (order, lying), start = self._lying, 0
    for segment in self.segments:
      size = len(segment["square"])
      low, high = np.searchsorted(lying, [start, start + size])
      for first in range(low, high, most):
        rows = order[first : min(first + most, high)]
        where = self.position[rows] - start
        straight = where[-1] - where[0] + 1 == len(where) and np.all(np.diff(where) == 1)
        yield rows, segment, slice(where[0], where[-1] + 1) if straight else where
      start += size

  def take(self, rows: np.ndarray) -> Block:
    """Some rows, in the order given."""
    rows = np.asarray(rows, np.int64)
    numbers = (wide(self.stored(name, rows)) for name in NUMBERS)
    return Block(rows, *numbers, self.segments[0]["gradients"].dtype == NARROW)

  def stored(self, name: str, rows: np.ndarray) -> np.ndarray:
    """One array of some rows, in the order given, as narrow as it is stored."""
    order = np.argsort(self.position[rows], kind="stable")  # they are read in the order in which they lie
    lying, start = self.position[rows][order], 0
    found = np.empty((len(rows), *self.segments[0][name].shape[1:]), self.segments[0][name].dtype)
    for segment in self.segments:
      stop = start + len(segment["square"])
      low, high = np.searchsorted(lying, [start, stop])
      if low < high:
        found[order[low:high]] = segment[name][lying[low:high] - start]
      start = stop
    return found
