"""Where the examples of a packed batch lie: for passes that give something of each example, not of a row."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from in2core_jax.data.packing import Cells, PackedShape


class Spots(NamedTuple):
  """Where the examples of a packed batch lie.

  Attributes:
    members: int32 [W, T], which example of its row a token belongs to; S on padding.
    place: int32 [G, E / G], row of the group times S plus which example of the row; 0 where there is none.
    last: int32 [G, E / G], the last token, counted from the first of the group; 0 where there is none.
    lengths: int32 [E], tokens; 1 where there is no example.
  """

  members: np.ndarray
  place: np.ndarray
  last: np.ndarray
  lengths: np.ndarray


def examples_of(cells: Cells) -> list[int]:
  """The examples of a batch in the order of `Packer.batch`."""
  return [example for cell in cells for row in cell for example in row]


def most_in_a_row(plan: Iterable[tuple[PackedShape, Cells]]) -> int:
  """S: no row of a plan holds more examples; a power of two, so that few programs are compiled."""
  most = max((len(row) for _, cells in plan for cell in cells for row in cell), default=1)
  return 1 << (most - 1).bit_length()


def spots_of(cells: Cells, shape: PackedShape, tokens: Sequence[np.ndarray], most: int) -> Spots:
  """Where the examples of a batch lie.

  Args:
    cells: rows of each group, and examples of each row. shape: of the batch.
    tokens: of each example of the data set.
    most: S of `most_in_a_row`.
  """
  members = np.full((len(cells), shape.height, shape.num_tokens), most, np.int32)
  place, last = np.zeros((2, len(cells), shape.size), np.int32)
  lengths = np.ones((len(cells), shape.size), np.int32)
  for group, cell in enumerate(cells):
    number = 0
    for height, row in enumerate(cell):
      start = 0
      for which, example in enumerate(row):
        stop = start + len(tokens[example])
        members[group, height, start:stop] = which
        place[group, number] = height * most + which
        last[group, number] = height * shape.num_tokens + stop - 1
        lengths[group, number] = stop - start
        start, number = stop, number + 1
  return Spots(members.reshape(-1, shape.num_tokens), place, last, lengths.reshape(-1))
