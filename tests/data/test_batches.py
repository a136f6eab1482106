"""Batches: the off-by-one, padding, shapes by brute force, each example exactly once."""

import itertools
import types

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from in2core_jax.data.batches import Batch, Batcher, Shape, plan_shapes
from in2core_jax.errors import UserError


def _dataset(lengths):
  """Examples with given (tokens, response tokens); the responses are the last tokens, ids are unique numbers."""
  tokens, masks = [], []
  for i, (num_tokens, num_responses) in enumerate(lengths):
    tokens.append(np.arange(num_tokens, dtype=np.int32) + 1000 * (i + 1))
    masks.append(np.arange(num_tokens) >= num_tokens - num_responses)
  return types.SimpleNamespace(
    tokens=tuple(tokens), response_mask=tuple(masks), ids=tuple(f"e{i}" for i in range(len(lengths)))
  )


class _Hidden:
  """Hidden states that name their own place: h[row, t] = [row, t]."""

  def __init__(self, dtype=np.float32):
    self.dtype, self.asked = dtype, []

  def gather(self, rows, num_tokens):
    self.asked.append((tuple(rows), num_tokens))
    t = np.broadcast_to(np.arange(num_tokens), (len(rows), num_tokens))
    return np.stack([np.broadcast_to(np.asarray(rows)[:, None], t.shape), t], -1).astype(self.dtype)


def test_three_rows_of_the_docstring():
  dataset = types.SimpleNamespace(
    tokens=(np.array([5, 6, 7, 20, 21, 22], np.int32),), response_mask=(np.array([0, 0, 0, 1, 1, 1], bool),), ids=("a",)
  )
  batch = Batcher(dataset, [Shape(7, 4)], pad_id=9).batch([0], Shape(7, 4), 2)
  np.testing.assert_array_equal(batch.tokens, [[5, 6, 7, 20, 21, 22, 9], [9] * 7])
  np.testing.assert_array_equal(batch.position, [[2, 3, 4, 0], [0, 0, 0, 0]])
  np.testing.assert_array_equal(batch.target, [[20, 21, 22, 0], [0, 0, 0, 0]])
  np.testing.assert_array_equal(batch.weight, np.float32([[1 / 3, 1 / 3, 1 / 3, 0], [0, 0, 0, 0]]))
  np.testing.assert_array_equal(batch.valid, [1, 0])
  assert [leaf.dtype for leaf in (batch.tokens, batch.position, batch.target)] == [np.int32] * 3
  assert batch.weight.dtype == batch.valid.dtype == np.float32
  assert batch.hidden is None
  assert len(jax.tree.leaves(batch)) == 6  # a pytree; None is no leaf
  np.testing.assert_array_equal(batch.slots[0, :4], [0, 1, 2, 8])  # the three filled slots, then padding


def test_several_responses_in_one_example():
  tokens = np.arange(10, 20, dtype=np.int32)
  mask = np.zeros(10, bool)
  mask[[2, 3, 8]] = True  # two turns
  dataset = types.SimpleNamespace(tokens=(tokens,), response_mask=(mask,), ids=("a",))
  batch = Batcher(dataset, [Shape(16, 16)], reduction="sum").batch([0], Shape(16, 16), 1)
  np.testing.assert_array_equal(batch.position[0, :3], [1, 2, 7])
  np.testing.assert_array_equal(batch.target[0, :3], [12, 13, 18])
  np.testing.assert_array_equal(batch.weight[0], [1, 1, 1] + [0] * 13)


def test_weighted_sum_is_the_mean_over_response_tokens_and_ignores_padding():
  dataset = _dataset([(9, 4), (5, 0), (12, 1)])
  batch = Batcher(dataset, [Shape(16, 8)]).batch([0, 1, 2], Shape(16, 8), 4)
  nll = np.random.default_rng(0).uniform(1, 2, (4, 16))  # nll[b, t]: of the token that follows position t
  losses = (batch.weight * np.take_along_axis(nll, batch.position, 1)).sum(1)
  np.testing.assert_allclose(losses, [nll[0, 4:8].mean(), 0, nll[2, 10], 0], rtol=1e-6)
  np.testing.assert_array_equal(batch.valid, [1, 1, 1, 0])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_hidden_states_are_those_of_the_rows(dtype):
  hidden = _Hidden(dtype)
  batcher = Batcher(_dataset([(8, 2)] * 5), [Shape(16, 16)], hidden=hidden)
  batch = batcher.batch([3, 1], Shape(16, 16), 4)
  assert hidden.asked == [((3, 1), 16)]
  assert batch.hidden.shape == (4, 16, 2) and batch.hidden.dtype == dtype
  np.testing.assert_array_equal(batch.hidden[:2, 0, 0].astype(int), [3, 1])
  np.testing.assert_array_equal(batch.hidden[0, :, 1].astype(int), np.arange(16))
  assert not batch.hidden[2:].any()


# --- shapes


def _cost(shapes, lengths, block_cost=106.0, head_cost=28.0):
  total = 0.0
  for num_tokens, num_responses in lengths:
    total += min(
      block_cost * s.num_tokens + head_cost * s.num_responses
      for s in shapes
      if s.num_tokens >= num_tokens and s.num_responses >= num_responses
    )
  return total


def _cheapest_by_brute_force(lengths, max_shapes, multiple, block_cost, head_cost):
  up = lambda x: max(1, -(-x // multiple)) * multiple  # noqa: E731
  tops = sorted({up(t) for t, _ in lengths})
  best = np.inf
  for count in range(1, min(max_shapes, len(tops)) + 1):
    for chosen in itertools.combinations(tops[:-1], count - 1):
      shapes = [Shape(t, up(max(r for n, r in lengths if up(n) <= t))) for t in (*chosen, tops[-1])]
      best = min(best, _cost(shapes, lengths, block_cost, head_cost))
  return best


_lengths = st.lists(
  st.integers(1, 60).flatmap(lambda t: st.tuples(st.just(t), st.integers(0, t - 1))), min_size=1, max_size=20
)


@settings(max_examples=60, deadline=None)
@given(_lengths, st.integers(1, 4), st.sampled_from([1, 8]), st.sampled_from([(106.0, 28.0), (1.0, 50.0)]))
def test_plan_is_the_cheapest_chain(lengths, max_shapes, multiple, costs):
  tokens, responses = zip(*lengths, strict=True)
  shapes = plan_shapes(tokens, responses, max_shapes, multiple, *costs)
  assert 1 <= len(shapes) <= max_shapes
  assert shapes[-1].num_tokens >= max(tokens) and shapes[-1].num_responses >= max(responses)
  assert all(x % multiple == 0 for shape in shapes for x in shape)
  for low, high in itertools.pairwise(shapes):
    assert low.num_tokens < high.num_tokens and low.num_responses <= high.num_responses
  # Each example's shape is the first that is long enough: its R holds it, because R is a running maximum.
  planned = sum(
    costs[0] * s.num_tokens + costs[1] * s.num_responses
    for t, _ in lengths
    for s in [next(s for s in shapes if s.num_tokens >= t)]
  )
  np.testing.assert_allclose(planned, _cheapest_by_brute_force(lengths, max_shapes, multiple, *costs), rtol=1e-12)


def test_plan_of_a_known_case():
  # 100 short and 10 long examples: two shapes, cut where the lengths leave a gap.
  assert plan_shapes([20] * 100 + [200] * 10, [5] * 100 + [100] * 10) == (Shape(32, 16), Shape(208, 112))
  assert plan_shapes([20] * 100 + [200] * 10, [5] * 100 + [100] * 10, max_shapes=1) == (Shape(208, 112),)
  assert plan_shapes([7], [0], multiple=4) == (Shape(8, 4),)


def test_dear_head_separates_long_responses():
  # Short prompts with long responses before a long prompt: where the head is dear, lengths are cut to spare it.
  tokens, responses = [16] * 50 + [32] * 50 + [48] * 50, [1] * 50 + [1] * 50 + [40] * 50
  assert plan_shapes(tokens, responses, 2, 16, block_cost=0.001, head_cost=100.0)[0] == Shape(32, 16)


def test_plan_refuses_nonsense():
  with pytest.raises(UserError, match="at least one example"):
    plan_shapes([], [])
  with pytest.raises(UserError, match="at least one example"):
    plan_shapes([3, 4], [1])
  with pytest.raises(UserError, match="max_shapes=0"):
    plan_shapes([3], [1], max_shapes=0)


# --- walks over the data


@settings(max_examples=40, deadline=None)
@given(_lengths, st.integers(1, 300), st.integers(1, 3))
def test_each_example_exactly_once(lengths, batch_tokens, multiple_of):
  dataset = _dataset(lengths)
  tokens, responses = zip(*lengths, strict=True)
  shapes = plan_shapes(tokens, responses, 3, 8)
  batcher = Batcher(dataset, shapes, multiple_of=multiple_of)
  sizes = {}
  seen = []
  for rows, batch in batcher.sequential(batch_tokens):
    seen += list(rows)
    size, num_tokens = batch.tokens.shape
    sizes.setdefault(num_tokens, set()).add(size)
    most = -(-max(1, batch_tokens // num_tokens) // multiple_of) * multiple_of
    assert size % multiple_of == 0 and len(rows) <= size <= most
    _check_rows(batch, rows, dataset)
  assert sorted(seen) == list(range(len(lengths)))
  assert all(len(s) == 1 for s in sizes.values())  # one size a shape: nothing new to compile for the last batch
  for num_tokens in sizes:  # little of it is padding, also when a shape has few examples
    plan = [(len(rows), size) for rows, shape, size in batcher.sequential_plan(batch_tokens) if shape[0] == num_tokens]
    real, held = (sum(column) for column in zip(*plan, strict=True))
    assert held <= 7 / 6 * real or held - real < 4 * len(plan) + multiple_of * len(plan)


def _check_rows(batch, rows, dataset):
  assert isinstance(batch, Batch)
  np.testing.assert_array_equal(batch.valid, np.arange(len(batch.valid)) < len(rows))
  for b, row in enumerate(rows):
    np.testing.assert_array_equal(batch.tokens[b, : len(dataset.tokens[row])], dataset.tokens[row])
    slots = batch.weight[b] > 0
    assert slots.sum() == dataset.response_mask[row].sum()
    np.testing.assert_array_equal(batch.target[b, slots], dataset.tokens[row][dataset.response_mask[row]])
    # What is predicted from a position is the very next token.
    np.testing.assert_array_equal(batch.target[b, slots], batch.tokens[b, batch.position[b, slots] + 1])


def test_sequential_order_is_by_shape_with_even_responses():
  dataset = _dataset([(30, 2), (5, 1), (5, 3), (31, 1), (5, 1), (4, 1)])
  batcher = Batcher(dataset, [Shape(8, 4), Shape(32, 4)])
  walked = [(list(rows), batch.tokens.shape) for rows, batch in batcher.sequential(16)]
  assert walked == [([2, 5], (2, 8)), ([1, 4], (2, 8)), ([0], (1, 32)), ([3], (1, 32))]


def test_responses_are_dealt_evenly():
  rng = np.random.default_rng(0)
  lengths = [(40, int(n)) for n in rng.integers(1, 33, 203)]
  batcher = Batcher(_dataset(lengths), [Shape(40, 40)])
  totals = [sum(lengths[row][1] for row in rows) for rows, _, _ in batcher.sequential_plan(640) if len(rows) == 16]
  assert len(totals) == 12 and max(totals) - min(totals) <= 32
  slots = {batch.slots.shape for _, batch in batcher.sequential(640)}
  assert len(slots) <= 2 and max(shape[1] for shape in slots) <= 0.7 * 16 * 40
  layout = batcher.layout_of(batcher.sequential_plan(640))
  few = Batcher(_dataset(lengths[:5]), [Shape(40, 40)], layout=layout)
  (_, small), (_, large) = next(few.sequential(640)), next(batcher.sequential(640))
  assert [np.shape(leaf) for leaf in small[2:]] == [np.shape(leaf) for leaf in large[2:]]


def test_errors_name_the_example():
  dataset = _dataset([(5, 1), (40, 3)])
  with pytest.raises(UserError, match="'e1' has 40 tokens"):
    Batcher(dataset, [Shape(16, 16)])
  with pytest.raises(UserError, match="must grow"):
    Batcher(dataset, [Shape(64, 16), Shape(16, 16)])
  with pytest.raises(UserError, match="mean, sum"):
    Batcher(dataset, [Shape(64, 16)], reduction="average")
  batcher = Batcher(dataset, [Shape(16, 16), Shape(64, 16)])
  with pytest.raises(UserError, match="'e1' has 40 tokens"):
    batcher.batch([1], Shape(16, 16), 1)
  with pytest.raises(UserError, match="2 rows"):
    batcher.batch([0, 1], Shape(64, 16), 1)
  first = types.SimpleNamespace(tokens=(np.zeros(3, np.int32),), response_mask=(np.ones(3, bool),), ids=("z",))
  with pytest.raises(UserError, match="'z' has a response token at t = 0"):
    Batcher(first, [Shape(8, 4)]).batch([0], Shape(8, 4), 1)
