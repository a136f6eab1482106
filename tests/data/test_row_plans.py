"""Plans in flat arrays against the plain algorithm."""

import bisect
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from in2core_jax.data import row_plans
from in2core_jax.data.packing import Packer


def plain_best_fit(lengths, capacity):
  """Best-fit decreasing with a sorted list of (free space, bin)."""
  bins, room = [], []
  for item in np.argsort(-np.asarray(lengths), kind="stable").tolist():
    at = bisect.bisect_left(room, (lengths[item], -1))
    free, chosen = (capacity, len(bins)) if at == len(room) else room.pop(at)
    bins += [[]] if chosen == len(bins) else []
    bins[chosen].append(item)
    bisect.insort(room, (free - lengths[item], chosen))
  return bins


def plain_plan(packer, batch_tokens):
  """(row length, cells) of each batch, with lists."""
  plan = []
  for length, members in packer._classes().items():
    rows = [[int(members[i]) for i in row] for row in plain_best_fit(packer._lengths[members].tolist(), length)]
    height = max(1, batch_tokens // length // packer.groups)
    count = -(-len(rows) // (height * packer.groups)) * packer.groups
    rows.sort(key=lambda row: -sum(packer._responses[row]))
    cells = [[] for _ in range(count)]
    for turn in range(0, len(rows), count):
      order = range(count) if turn // count % 2 == 0 else reversed(range(count))
      for cell, row in zip(order, rows[turn : turn + count], strict=False):
        cells[cell].append(row)
    plan += [(length, cells[first : first + packer.groups]) for first in range(0, count, packer.groups)]
  return plan


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 40), max_size=60), st.integers(40, 70))
def test_best_fit_is_that_of_a_sorted_list(lengths, capacity):
  assert row_plans.best_fit(lengths, capacity) == plain_best_fit(lengths, capacity)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_a_plan_in_flat_arrays_is_that_of_lists(groups):
  rng = np.random.default_rng(groups)
  lengths = [*rng.integers(2, 90, 70).tolist(), 700, 1200, 530]
  masks = [np.arange(length) >= rng.integers(1, length) for length in lengths]
  data = types.SimpleNamespace(tokens=[np.zeros(length, np.int32) for length in lengths], response_mask=masks, ids=[])
  packer = Packer(data, groups=groups)
  plan, expected = packer.sequential_plan(300), plain_plan(packer, 300)
  assert [(shape.num_tokens, cells) for shape, cells in plan] == expected and len(plan) == len(expected)
  assert plan[-1][1] == expected[-1][1] and [cells for _, cells in plan[1:3]] == [cells for _, cells in expected[1:3]]
  assert [cells for _, cells in plan[1:][1:]] == [cells for _, cells in expected[2:]] and len(plan[-2:]) == 2
  with pytest.raises(IndexError):
    plan[len(plan)]
