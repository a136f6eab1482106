"""Examples laid out in rows: where each of them lies; letters as in `packing`."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from in2core_jax.data.batches import within_sequences
from in2core_jax.data.row_plans import pack, row_lengths


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
