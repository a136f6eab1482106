"""From values on single queries to one per example: against the rules spelled out."""

import numpy as np
import pytest

from in2core_jax.errors import UserError
from in2core_jax.selection import aggregation
from in2core_jax.selection.aggregation import aggregate, turn_order


def test_aggregate_mean_and_topic_max():
  scores = np.random.default_rng(0).normal(size=(5, 12))
  scores[4] *= 1000  # the topic with large gradients must not decide alone
  topics = ["b", "a", "b", "a", "c"]
  np.testing.assert_allclose(aggregate(scores, topics, "mean"), scores.mean(axis=0))
  means = np.stack([scores[[1, 3]].mean(axis=0), scores[[0, 2]].mean(axis=0), scores[4]])
  expected = (means / np.sqrt((means**2).mean(axis=1))[:, None]).max(axis=0)
  result = aggregate(scores, topics, "topic_max")
  np.testing.assert_allclose(result, expected)
  scaled = scores * np.array([1.0, 7.0, 1.0, 7.0, 0.001])[:, None]
  np.testing.assert_allclose(aggregate(scaled, topics, "topic_max"), expected)
  assert np.all(aggregate(np.zeros((2, 3)), ["a", "b"], "topic_max") == 0)


def test_aggregate_topic_quota_takes_turns():
  scores = np.array([[5.0, 4.0, 3.0, 0.0, 0.0], [9.0, 1.0, 2.0, 0.0, 0.0]])
  priority = aggregate(scores, ["a", "b"], "topic_quota", ids=["v", "w", "x", "z", "y"])
  # a takes 0; b's best is 0, taken, so 2; a takes 1; then the ties of zeros go by id: 4 (y) before 3 (z)
  assert np.argsort(-priority).tolist() == [0, 2, 1, 4, 3]
  assert priority.tolist() == [5, 3, 4, 1, 2]


def test_aggregate_refuses():
  with pytest.raises(UserError, match="choose one of mean"):
    aggregate(np.zeros((1, 2)), ["a"], "median")
  with pytest.raises(UserError, match="expected"):
    aggregate(np.zeros((1, 2)), ["a", "b"])
  with pytest.raises(UserError, match="1 of 2 are NaN or infinite .first: y"):
    aggregate(np.array([[0.0, np.nan]]), ["a"], "mean", ids=["x", "y"])


def test_the_nearest_queries_of_an_example_decide():
  cosines = np.array([[0.9, 0.1], [0.1, 0.3], [0.5, 0.2]])
  np.testing.assert_allclose(aggregation.nearest_mean(cosines, 1), [0.9, 0.3])
  np.testing.assert_allclose(aggregation.nearest_mean(cosines, 2), [0.7, 0.25])
  np.testing.assert_allclose(aggregation.nearest_mean(cosines), cosines.mean(axis=0))
  np.testing.assert_allclose(aggregate(cosines, ["", "", ""], "nearest"), cosines.mean(axis=0))
  with pytest.raises(UserError, match="at least 1"):
    aggregation.nearest_mean(cosines, 0)


def test_queries_take_turns():
  rng = np.random.default_rng(0)
  scores = rng.normal(size=(4, 23)).round(1)  # with ties
  ids = [f"id{i:02d}" for i in rng.permutation(23)]
  order = np.argsort(-aggregate(scores, [""] * 4, "round_robin", ids))
  free = set(range(23))
  for turn, row in enumerate(order):
    mine = scores[turn % 4]
    assert row == min(free, key=lambda i: (-mine[i], ids[i]))
    free.remove(int(row))


def test_turns_go_by_share_and_no_query_waits_longer_than_its_own_turn():
  assert turn_order(np.full(3, 0.25), 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
  shares = np.random.default_rng(0).uniform(0.05, 3, 9)
  order = turn_order(shares, 500)
  counts = (order[:, None] == np.arange(9)).cumsum(axis=0)
  fair = np.arange(1, 501)[:, None] * shares / shares.sum()
  assert np.abs(counts - fair).max() <= 2 and len(order) == 500
  assert sorted(order[:9]) == list(range(9))  # nobody has a second turn before all have had one
  for bad in ([0.0, 1.0], [-1.0, 1.0], [np.nan, 1.0], [[1.0]]):
    with pytest.raises(UserError, match="shares of turns must be positive"):
      turn_order(np.array(bad), 4)


def test_a_query_with_three_shares_has_three_turns_in_four():
  scores = np.array([np.arange(20.0), -np.arange(20.0)])  # the first wants the last rows, the second the first ones
  priority = aggregate(scores, ["", ""], "weighted_turns", tokens=np.array([50, 0]))  # half equal, half by token
  with pytest.raises(UserError, match="weighted_turns needs the response tokens of 2 queries"):
    aggregate(scores, ["", ""], "weighted_turns")
  assert sorted(np.argsort(-priority)[:8]) == [0, 1, 14, 15, 16, 17, 18, 19]


# ---------------------------------------------------------------------------------------- sources with weights


def test_each_source_has_its_share_of_the_mean_and_of_the_turns():
  rng = np.random.default_rng(0)
  scores, codes = rng.normal(size=(6, 40)), np.array([0, 0, 0, 0, 1, 1])
  sources = aggregation.Sources(codes, np.array([0.3, 0.7]))
  wanted = 0.3 * scores[:4].mean(axis=0) + 0.7 * scores[4:].mean(axis=0)
  np.testing.assert_allclose(aggregate(scores, [""] * 6, "mean", sources=sources), wanted)
  turns = aggregation.whose_turns("round_robin", 6, 40, sources=sources)
  for size in (3, 10, 40):  # every beginning has the shares, to within a turn
    assert abs(np.count_nonzero(codes[turns[:size]] == 0) - 0.3 * size) <= 1
  assert np.bincount(turns).tolist() == [3, 3, 3, 3, 14, 14]
  by_token = aggregation.whose_turns("weighted_turns", 6, 40, np.array([1, 1, 1, 9, 5, 5]), sources)
  assert np.bincount(by_token)[3] > np.bincount(by_token)[0] and np.count_nonzero(codes[by_token] == 0) == 12
  with pytest.raises(UserError, match="aggregate=nearest has no weights of sources"):
    aggregate(scores, [""] * 6, "nearest", sources=sources)


@pytest.mark.parametrize("how", aggregation.WEIGHED)
def test_sources_that_weigh_as_many_examples_as_they_have_leave_all_queries_alike(how):
  rng = np.random.default_rng(1)
  scores, tokens = rng.normal(size=(6, 20)), np.full(6, 4)
  sources = aggregation.Sources(np.array([0, 1, 0, 1, 1, 1]), np.array([2.0, 4.0]))
  if how == "mean":
    np.testing.assert_allclose(aggregate(scores, [""] * 6, how, sources=sources), scores.mean(axis=0))
  else:
    assert np.bincount(aggregation.whose_turns(how, 6, 12, tokens, sources)).tolist() == [2] * 6


def test_a_source_without_a_query_here_leaves_the_turns_to_the_others():
  sources = aggregation.Sources(np.array([0, 2, 1]), np.array([0.2, 0.3, 0.5])).take(np.array([0, 1]))
  assert sources.spread(np.ones(2)).tolist() == [0.2, 0.5]
  assert np.bincount(aggregation.whose_turns("round_robin", 2, 7, sources=sources)).tolist() == [2, 5]
