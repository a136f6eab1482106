"""Examples laid out in rows: which examples share a row, and where each of them lies; letters as in `packing`."""

import bisect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from in2core_jax.data.batches import within_sequences

# Attention over a row costs its length for every token. Up to here that is little beside the layer's matrices; longer
# examples go into rows of their own length class, so that short ones do not pay for them.
SHORT_ROW = 512


class PackedRows(NamedTuple):
  """Examples laid out in rows of one length.

  Attributes:
    tokens: int32 [W, T].
    offsets: int32 [W, T], position of each token in its own example.
    examples: int64 [E], rows of the data set.
    places: int64 [E], where each begins in the flattened [W * T].
  """

  tokens: np.ndarray
  offsets: np.ndarray
  examples: np.ndarray
  places: np.ndarray


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
  """Distributes items over as few bins as best-fit decreasing finds (at most 11/9 of the optimum + 1, Johnson 1973).

  Args:
    lengths: size of each item, at most `capacity`.
    capacity: of a bin.

  Returns:
    For each bin its items' indices, in order of placement; equal lengths keep their order.
  """
  bins: list[list[int]] = []
  room: list[tuple[int, int]] = []  # (free space, bin), sorted
  for item in np.argsort(-np.asarray(lengths, np.int64), kind="stable"):
    length = int(lengths[item])
    at = bisect.bisect_left(room, (length, -1))
    if at == len(room):
      bins.append([])
      free, chosen = capacity, len(bins) - 1
    else:
      free, chosen = room.pop(at)
    bins[chosen].append(int(item))
    bisect.insort(room, (free - length, chosen))
  return bins


def pack(members: np.ndarray, lengths: np.ndarray, capacity: int) -> list[list[int]]:
  """Rows of at most `capacity` tokens that hold the examples `members`; lengths are those of the whole data set."""
  return [[int(members[item]) for item in row] for row in best_fit(lengths[members], capacity)]


def row_lengths(lengths: np.ndarray, multiple: int = 16) -> dict[int, np.ndarray]:
  """Row length of each length class -> the examples in it: up to `SHORT_ROW`, and a class for each doubling above.

  A row is as long as the class's longest example, rounded up to `multiple`.
  """
  lengths = np.asarray(lengths, np.int64)
  doublings = np.ceil(np.log2(np.maximum(lengths, SHORT_ROW) / SHORT_ROW)).astype(np.int64)
  classes = (np.flatnonzero(doublings == step) for step in np.unique(doublings))
  return {-(-int(lengths[members].max()) // multiple) * multiple: members for members in classes}


def packed_plan(lengths: np.ndarray, batch_tokens: int, multiple_of: int = 1) -> list[tuple[int, int, list[list[int]]]]:
  """Cuts a data set into batches of packed rows: (row length T, rows W, examples of each row).

  Args:
    lengths: tokens of each example.
    batch_tokens: W * T, about.
    multiple_of: W is rounded up to a multiple of this (devices that share the rows).
  """
  plan = []
  for length, members in row_lengths(lengths).items():
    rows = pack(members, np.asarray(lengths), length)
    height = -(-max(1, batch_tokens // length) // multiple_of) * multiple_of
    # Fewer rows than a batch holds: no more rows than there are.
    height = min(height, -(-len(rows) // multiple_of) * multiple_of)
    plan += [(length, height, rows[start : start + height]) for start in range(0, len(rows), height)]
  return plan


def lay_out(
  tokens: Sequence[np.ndarray],
  length: int,
  height: int,
  rows: list[list[int]],
  pad_id: int,
  second: np.ndarray | None = None,
) -> PackedRows:
  """Builds one batch of a `packed_plan`.

  Args:
    tokens: of each example of the data set.
    length: T.
    height: W.
    rows: examples of each row, at most W rows.
    pad_id: token id of padding.
    second: of preference pairs, where the rejected side of each begins (`batches.rejected_starts`).
  """
  packed = np.full((height, length), pad_id, np.int32)
  offsets = np.zeros((height, length), np.int32)
  examples, places = [], []
  for number, row in enumerate(rows):
    start = 0
    for example in row:
      stop = start + len(tokens[example])
      packed[number, start:stop] = tokens[example]
      offsets[number, start:stop] = within_sequences(stop - start, 0 if second is None else second[example])
      examples.append(example)
      places.append(number * length + start)
      start = stop
  return PackedRows(packed, offsets, np.array(examples, np.int64), np.array(places, np.int64))


def packed_batches(
  tokens: Sequence[np.ndarray],
  plan: list[tuple[int, int, list[list[int]]]],
  pad_id: int = 0,
  second: np.ndarray | None = None,
) -> Iterator[PackedRows]:
  """The batches of a plan, one by one; arguments as in `lay_out`."""
  for length, height, rows in plan:
    yield lay_out(tokens, length, height, rows, pad_id, second)
