"""The best examples of each query out of a stream of blocks, and queries that take turns among them.

A value and the tie-breaking place of its example are one whole number, so that ties are exact: the larger value first,
then the smaller place. Nothing of the size queries x examples is held.

Letters: Q queries, N examples, n of a block, K kept for each query.
"""

from collections.abc import Callable, Iterator

import numpy as np

_SIGN = np.int64(0x7FFFFFFF)
MOST_KEPT = 2**24  # keys of all queries together: 128 MB

# A pass over the pool: yields (rows int [n], values f32 [Q, n]).
Pass = Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]


def keys_of(values: np.ndarray, places: np.ndarray) -> np.ndarray:
  """Values f32 and places int in [0, 2^31) -> int64 that grow with the value and fall with the place.

  A float's bits, read as a whole number, grow with it; those of negative ones are turned round. -0.0 counts as 0.0.
  """
  bits = (np.asarray(values, np.float32) + np.float32(0)).view(np.int32).astype(np.int64)
  ordered = np.where(bits < 0, bits ^ _SIGN, bits)
  return (ordered << 32) | (_SIGN - np.asarray(places, np.int64))


def values_of(keys: np.ndarray) -> np.ndarray:
  """The values of `keys_of`, f32."""
  ordered = keys >> 32
  return np.where(ordered < 0, ordered ^ _SIGN, ordered).astype(np.int32).view(np.float32)


def places_of(keys: np.ndarray) -> np.ndarray:
  """The places of `keys_of`, int64."""
  return _SIGN - (keys & np.int64(0xFFFFFFFF))


def best(blocks: Iterator[tuple[np.ndarray, np.ndarray]], queries: int, count: int) -> list[np.ndarray]:
  """The `count` largest keys of each query, best first.

  Args:
    blocks: yields (places int [n], values f32 [Q, n]); a place is the example's, among ties.
    queries: Q.
    count: K.

  Returns:
    Q arrays int64 of at most K keys.
  """
  kept = [np.zeros(0, np.int64) for _ in range(queries)]
  least = np.full(queries, -np.inf, np.float32)  # of the values that can still come in
  for places, values in blocks:
    may = values >= least[:, None]
    for query in np.flatnonzero(may.any(axis=1)):
      where = np.flatnonzero(may[query])
      kept[query] = joined = np.concatenate([kept[query], keys_of(values[query, where], places[where])])
      if len(joined) >= 2 * count:
        kept[query] = np.partition(joined, len(joined) - count)[len(joined) - count :]
        least[query] = values_of(kept[query].min(keepdims=True))[0]
  return [-np.sort(-keys)[:count] for keys in kept]


def in_turns(walk: Pass, turns: np.ndarray, queries: int, places: np.ndarray, kept: int | None = None) -> np.ndarray:
  """Queries take turns; each takes its best example that is not taken yet: `aggregation`'s round_robin, a beginning.

  Each query has a list of its best examples. When one is used up, all are made anew of what is not taken, in another
  pass.

  Args:
    walk: a pass over the pool; the same values at every call.
    turns: int [S], whose turn it is (`aggregation.turn_order`); S is at most the number of examples that take part.
    queries: Q.
    places: int [N], each example's place among ties, 0 to N - 1 and each once; -1 for examples that take no part.
    kept: length of the lists; from the number of turns when None.

  Returns:
    int64 [S], rows in order of choice.
  """
  free, size = places >= 0, len(places)
  row_of = np.empty(size, np.int64)
  row_of[places[free]] = np.flatnonzero(free)
  most = int(np.bincount(turns, minlength=queries).max(initial=1))
  count = kept or min(max(256, 8 * most), max(16, MOST_KEPT // queries))

  def untaken() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for rows, values in walk():
      mine = np.flatnonzero(free[rows])
      if len(mine):
        yield places[rows[mine]], values if len(mine) == len(rows) else values[:, mine]

  lists, at = best(untaken(), queries, count), [0] * queries
  chosen = np.empty(len(turns), np.int64)
  for turn, mine in enumerate(turns.tolist()):
    row = -1
    while row < 0:
      if at[mine] == len(lists[mine]):
        lists, at = best(untaken(), queries, count), [0] * queries
      row = row_of[places_of(lists[mine][at[mine]])]
      at[mine] += 1
      row = row if free[row] else -1
    chosen[turn], free[row] = row, False
  return chosen
