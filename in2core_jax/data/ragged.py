"""Token ids and masks of many examples, each kind in one flat array: no Python object for an example stays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

_TOGETHER = 4096  # items of a `Growing` that become one array


class Ragged(Sequence):
  """A sequence of arrays of different lengths. Items are made when they are asked for, and are the caller's own.

  Attributes:
    flat: the content of all items.
    starts: int64 [N], where each begins in `flat`.
    lengths: int32 [N], of each item.
    counts: int32 [N], how many numbers of each are not 0.
  """

  def __init__(self, flat: np.ndarray, starts: np.ndarray, lengths: np.ndarray, counts: np.ndarray):
    self.flat, self.starts, self.lengths, self.counts = flat, starts, lengths, counts

  @classmethod
  def of(cls, items: Iterable[Any]) -> Ragged:
    """Copies the items."""
    growing = Growing(cls)
    for item in items:
      growing.append(item)
    return growing.done()

  def take(self, rows: np.ndarray) -> Ragged:
    """Some of the items, int64 [n], which share the content."""
    return type(self)(self.flat, self.starts[rows], self.lengths[rows], self.counts[rows])

  def __len__(self) -> int:
    return len(self.starts)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return tuple(self[i] for i in range(*index.indices(len(self))))
    return self._item(int(self.starts[index]), int(self.lengths[index]))

  @staticmethod
  def _packed(item: np.ndarray) -> np.ndarray:
    raise NotImplementedError

  def _item(self, start: int, length: int) -> np.ndarray:
    raise NotImplementedError


class TokenIds(Ragged):
  """Token ids, int32 [T_i] each; kept in 16 bits while all of them fit."""

  @staticmethod
  def _packed(item: np.ndarray) -> np.ndarray:
    return item.astype(np.uint16 if item.max(initial=0) < 2**16 else np.uint32)

  def _item(self, start: int, length: int) -> np.ndarray:
    return self.flat[start : start + length].astype(np.int32)


class Masks(Ragged):
  """Masks, bool [T_i] each; kept as bits."""

  @staticmethod
  def _packed(item: np.ndarray) -> np.ndarray:
    return np.packbits(item)

  def _item(self, start: int, length: int) -> np.ndarray:
    return np.unpackbits(self.flat[start : start + -(-length // 8)], count=length).astype(bool)


class Growing:
  """A `Ragged` that gets one item after the other; some thousands at a time become one array."""

  def __init__(self, kind: type[Ragged]):
    self.kind = kind
    self._chunks: list[np.ndarray] = []
    self._waiting: list[np.ndarray] = []
    self._about: list[np.ndarray] = []  # of each chunk int64 [n, 3]: size in `flat`, length, numbers that are not 0
    self._told: list[tuple[int, int, int]] = []

  def append(self, item: Any) -> None:
    """Copies one item."""
    item = np.asarray(item)
    self._waiting.append(self.kind._packed(item))
    self._told.append((len(self._waiting[-1]), len(item), int(np.count_nonzero(item))))
    if len(self._waiting) == _TOGETHER:
      self._settle()

  def done(self) -> Ragged:
    """The sequence."""
    self._settle()
    flat = np.concatenate([np.zeros(0, np.uint8), *self._chunks])
    about = np.concatenate([np.zeros((0, 3), np.int64), *self._about])
    starts = np.cumsum(about[:, 0]) - about[:, 0]
    return self.kind(flat, starts, about[:, 1].astype(np.int32), about[:, 2].astype(np.int32))

  def _settle(self) -> None:
    if self._waiting:
      self._chunks.append(np.concatenate(self._waiting))
      self._about.append(np.array(self._told, np.int64).reshape(-1, 3))
    self._waiting, self._told = [], []


def taken(items: Sequence[np.ndarray], rows: np.ndarray) -> Sequence[np.ndarray]:
  """Some of the items, in whatever sequence they are."""
  return items.take(rows) if isinstance(items, Ragged) else tuple(items[i] for i in rows)


def lengths_of(items: Sequence[np.ndarray]) -> np.ndarray:
  """int32 [N], the length of each item."""
  return items.lengths.copy() if isinstance(items, Ragged) else np.array([len(item) for item in items], np.int32)


def counts_of(items: Sequence[np.ndarray]) -> np.ndarray:
  """int32 [N], how many numbers of each item are not 0."""
  if isinstance(items, Ragged):
    return items.counts.copy()
  return np.array([np.count_nonzero(item) for item in items], np.int32)
