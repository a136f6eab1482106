"""Token ids and masks of many examples, each kind in one flat array: no Python object for an example stays."""

from __future__ import annotations

import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

_TOGETHER = 4096  # items of a `Growing` that are written at once


class Ragged(Sequence):
  """A sequence of arrays of different lengths. Items are made when they are asked for, and are the caller's own.

  Attributes:
    flat: the content of all items.
    starts: int64 [N], where each begins, in numbers.
    lengths: int32 [N], of each item.
    counts: int32 [N], how many numbers of each are not 0; None where nobody has counted them.
  """

  def __init__(self, flat: np.ndarray, starts: np.ndarray, lengths: np.ndarray, counts: np.ndarray | None = None):
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
    counts = None if self.counts is None else self.counts[rows]
    return type(self)(self.flat, self.starts[rows], self.lengths[rows], counts)

  def __len__(self) -> int:
    return len(self.starts)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return tuple(self[i] for i in range(*index.indices(len(self))))
    return self._item(int(self.starts[index]), int(self.lengths[index]))

  def _item(self, start: int, length: int) -> np.ndarray:
    raise NotImplementedError


class TokenIds(Ragged):
  """Token ids, int32 [T_i] each; kept in 16 bits while all of them fit."""

  def _item(self, start: int, length: int) -> np.ndarray:
    return self.flat[start : start + length].astype(np.int32)


class Masks(Ragged):
  """Masks, bool [T_i] each; kept as bits, one after the other."""

  def _item(self, start: int, length: int) -> np.ndarray:
    bits = np.unpackbits(self.flat[start >> 3 : -(-(start + length) // 8)])
    return bits[start & 7 : (start & 7) + length].astype(bool)

  @property
  def first(self) -> np.ndarray:
    """bool [N], the first number of each; False of those that have none."""
    there = np.flatnonzero(self.lengths)
    found = np.zeros(len(self), bool)
    at = self.starts[there]
    found[there] = (self.flat[at >> 3] >> (7 - (at & 7)).astype(np.uint8)) & 1
    return found


class Growing:
  """A `Ragged` that gets one item after the other; some thousands at a time are written behind the others.

  What is there grows in its place (`array.array` reallocates): at no time are there two copies of it.
  """

  def __init__(self, kind: type[Ragged]):
    self.kind = kind
    self._written, self._dtype = array.array("B"), np.dtype(np.uint16 if kind is TokenIds else np.uint8)
    self._rest = np.zeros(0, bool)  # bits that do not fill a byte yet
    self._waiting: list[np.ndarray] = []
    self._lengths, self._counts = array.array("i"), array.array("i")

  def append(self, item: Any) -> None:
    """Copies one item."""
    item = np.array(item, bool if self.kind is Masks else np.int32)
    self._waiting.append(item)
    self._lengths.append(len(item))
    if self.kind is Masks:
      self._counts.append(int(np.count_nonzero(item)))
    if len(self._waiting) == _TOGETHER:
      self._settle()

  def done(self, beside: Ragged | None = None) -> Ragged:
    """The sequence.

    Args:
      beside: another one whose items may be as long as these: they are told once then.
    """
    self._settle()
    self._write(np.packbits(self._rest))
    flat = np.frombuffer(self._written, self._dtype) if self._written else np.zeros(0, self._dtype)
    lengths = _numbers(self._lengths)
    if beside is not None and np.array_equal(beside.lengths, lengths):
      starts, lengths = beside.starts, beside.lengths
    else:
      starts = np.zeros(len(lengths), np.int64)
      np.cumsum(lengths[:-1], out=starts[1:])
    return self.kind(flat, starts, lengths, _numbers(self._counts) if self.kind is Masks else None)

  def _settle(self) -> None:
    if not self._waiting:
      return
    joined = np.concatenate(self._waiting)
    self._waiting = []
    if self.kind is Masks:
      bits = np.concatenate([self._rest, joined])
      whole = len(bits) // 8 * 8
      self._rest = bits[whole:]
      joined = np.packbits(bits[:whole])
    elif self._dtype == np.uint16 and joined.max(initial=0) >= 2**16:
      self._dtype = np.dtype(np.uint32)
      self._written = array.array("B", np.frombuffer(self._written, np.uint16).astype(np.uint32).tobytes())
    self._write(joined)

  def _write(self, numbers: np.ndarray) -> None:
    self._written.frombytes(numbers.astype(self._dtype, copy=False).tobytes())


def _numbers(found: array.array) -> np.ndarray:
  return np.frombuffer(found, np.int32) if found else np.zeros(0, np.int32)


def taken(items: Sequence[Any], rows: np.ndarray) -> Sequence[Any]:
  """Some of the items, in whatever sequence they are."""
  return items.take(rows) if hasattr(items, "take") else tuple(items[i] for i in rows)


def lengths_of(items: Sequence[np.ndarray]) -> np.ndarray:
  """int32 [N], the length of each item."""
  return items.lengths.copy() if isinstance(items, Ragged) else np.array([len(item) for item in items], np.int32)


def counts_of(items: Sequence[np.ndarray]) -> np.ndarray:
  """int32 [N], how many numbers of each item are not 0."""
  if isinstance(items, Ragged) and items.counts is not None:
    return items.counts.copy()
  return np.array([np.count_nonzero(item) for item in items], np.int32)


def firsts_of(masks: Sequence[np.ndarray]) -> np.ndarray:
  """bool [N], the first of each mask; False of those that have none."""
  if isinstance(masks, Masks):
    return masks.first
  return np.array([len(mask) > 0 and bool(mask[0]) for mask in masks], bool)
